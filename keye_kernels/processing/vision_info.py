"""Loads the images and videos of conversations, with the interface of `keye_vl_utils.process_vision_info`."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from keye_kernels.editions import EditionName, edition_named

from .edition_marks import mark_edition
from .images import decode_repeated, fetch_image
from .threads import map_in_threads
from .videos import SampledVideo, fetch_video

Messages = Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]]


def split_conversations(messages: Messages) -> list[Sequence[Mapping[str, Any]]]:
    """Returns one conversation, or a batch of conversations, as a list of conversations.

    Raises TypeError if `messages` is not a list of turns or a text is not a string, ValueError for an empty list or a turn
    without role or known content.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise TypeError(
            "messages must be a list of turns such as {'role': 'user', 'content': ...} or a list of such lists, "
            f"got {type(messages).__name__}"
        )
    if not messages:
        raise ValueError("messages must not be empty")
    conversations: list[Any] = [messages] if isinstance(messages[0], Mapping) else list(messages)
    for conversation in conversations:
        if isinstance(conversation, str) or not isinstance(conversation, Sequence):
            raise TypeError(f"messages must hold turns or lists of turns, got {type(conversation).__name__}")
        if not conversation:
            raise ValueError("messages holds an empty conversation; each needs at least one turn")
        for turn in conversation:
            if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
                raise ValueError(f"each turn needs 'role' and 'content', got {_shorten(turn)}")
            if not isinstance(turn["role"], str):
                raise TypeError(f"role must be a string, got {type(turn['role']).__name__}")
            _check_content(turn["content"])
    return conversations


def modality(part: Mapping[str, Any]) -> str | None:
    """Returns "image" or "video" for a message part with an image or a video, and None for text."""
    if "image" in part or "image_url" in part or part.get("type") in ("image", "image_url"):
        return "image"
    if "video" in part or "video_url" in part or part.get("type") in ("video", "video_url"):
        return "video"
    return None


def process_vision_info(
    messages: Messages,
    return_video_kwargs: bool = False,
    *,
    edition: EditionName = "preview",
    original_size: bool = False,
    workers: int | None = None,
    progress: bool = False,
    timeout: float | None = None,
    max_bytes: int | None = None,
) -> tuple[Any, ...]:
    """Loads and resizes all images and videos of the conversations, in order.

    Takes and returns what the official `keye_vl_utils.process_vision_info` does, with one difference for 1.5: `timestamps` has
    None for a video without times, so that all lists have one entry per video.

    Args:
        messages: one conversation or a list of them; options such as `fps` are entries of message parts, see docs/video.md.
        return_video_kwargs: for "preview", also return the processor's keyword arguments. "1.5" always returns them.
        edition: "preview" or "1.5"; pass `KeyeProcessor.edition` of the checkpoint.
        original_size: for "1.5", keep the frames of video files at their original size, as the official package does. With
            `KeyeProcessor` the inputs are the same, and resized frames take less memory.
        workers: number of images and videos loaded in parallel. Default: images in up to `torch.get_num_threads()` threads, one
            video at a time.
        progress: show a progress bar.
        timeout: time limit of each download in seconds. Default: 30 for an image, 300 for a video.
        max_bytes: size limit of each download. Default: 256 MiB for an image, 4 GiB for a video.

    Returns:
        `(images, videos)`, or `(images, videos, video_kwargs)`. `images` is a list of RGB images and `videos` a list of videos;
            each is None if there are none.

            For "preview", a video is a uint8 tensor `[N, 3, H, W]`. A video given as a list of images is a list of an even number
            of images; the last one is repeated if needed. `video_kwargs` is `{"fps": [...]}`, the sampled frames per second.

            For "1.5", a video is a uint8 tensor `[N, 3, H, W]`, or a list of uint8 tensors `[3, h, w]` if slow and fast frames
            differ in size. `video_kwargs` has `height`, `width`, `fast_height`, `fast_width`, `timestamps` and `frame_types`,
            each a list with one entry per video.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: an image or a video cannot be loaded, or an option is out of range; the message names it.
        TypeError: a source has an unsupported type.
    """
    slow_fast_frames = edition_named(edition).slow_fast_frames
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise ValueError(f"workers must be a positive integer, got {workers!r}")
    limits: dict[str, Any] = {"timeout": timeout, "max_bytes": max_bytes}
    limits = {name: limit for name, limit in limits.items() if limit is not None}

    # Decoders of videos have threads of their own
    one_video = threading.Lock() if workers is None else nullcontext()

    def fetch(part: Mapping[str, Any]) -> Any:
        if modality(part) == "image":
            return fetch_image(part, edition=edition, **limits)
        with one_video:
            return fetch_video(part, edition=edition, original_size=original_size, **limits)

    parts = _vision_parts(messages)
    decode_repeated(image for part in parts for image in _listed(part))
    if progress:
        from tqdm import tqdm

        with tqdm(total=len(parts), unit="file") as bar:
            fetched = map_in_threads(fetch, parts, workers, bar.update)
    else:
        fetched = map_in_threads(fetch, parts, workers)
    sampled = [item for item in fetched if isinstance(item, SampledVideo)]
    images = [mark_edition(item, edition) for item in fetched if not isinstance(item, SampledVideo)] or None
    videos = [mark_edition(video.frames, edition) for video in sampled] or None
    if slow_fast_frames:
        video_kwargs = {
            "height": [video.slow_size[0] for video in sampled],
            "width": [video.slow_size[1] for video in sampled],
            "fast_height": [video.fast_size[0] for video in sampled],
            "fast_width": [video.fast_size[1] for video in sampled],
            "timestamps": [video.seconds for video in sampled],
            "frame_types": [video.frame_types for video in sampled],
        }
        return images, videos, video_kwargs
    if return_video_kwargs:
        return images, videos, {"fps": [video.fps for video in sampled]}
    return images, videos


def _vision_parts(messages: Messages) -> list[Mapping[str, Any]]:
    return [
        part
        for conversation in split_conversations(messages)
        for turn in conversation
        if isinstance(turn["content"], (list, tuple))
        for part in turn["content"]
        if modality(part)
    ]


def _listed(part: Mapping[str, Any]) -> Sequence[Any]:
    """The image of a part, or the images of a video that is a list."""
    kind = modality(part)
    source = part.get(f"{kind}", part.get(f"{kind}_url"))
    return source if isinstance(source, (list, tuple)) else [source]


def _check_content(content: Any) -> None:
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, (list, tuple)):
        raise TypeError(f"content must be a string or a list of parts, got {type(content).__name__}")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str | None):
            raise TypeError(f"type of a part must be a string, got {type(kind).__name__}")
        if not isinstance(part, Mapping) or not ("text" in part or modality(part)):
            names = "'text', 'image', 'image_url', 'video' or 'video_url'"
            raise ValueError(f"a part of content must have {names}, got {_shorten(part)}")
        text = part.get("text")
        if not isinstance(text, str) and not (text is None and modality(part)):
            raise TypeError(f"text of a part must be a string, got {type(text).__name__}")


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:120] + "..."
