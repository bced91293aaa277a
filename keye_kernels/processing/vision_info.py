"""The pictures and videos of conversations, as ``keye_vl_utils.process_vision_info`` returns them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from .images import Edition, check_edition, fetch_image
from .videos import SampledVideo, fetch_video

VISION_KEYS = ("image", "image_url", "video")

Messages = Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]]


def split_conversations(messages: Messages) -> list[Sequence[Mapping[str, Any]]]:
    """A list of conversations from one conversation or a batch of them.

    Raises:
        ValueError, TypeError: ``messages`` is empty or is not made of turns with a role and a content.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise TypeError(
            "messages must be a list of turns such as {'role': 'user', 'content': ...} or a list of such lists, "
            f"got {type(messages).__name__}"
        )
    if not messages:
        raise ValueError("messages must not be empty")
    conversations = [messages] if isinstance(messages[0], Mapping) else list(messages)
    for conversation in conversations:
        if not conversation:
            raise ValueError("messages holds an empty conversation; each needs at least one turn")
        for turn in conversation:
            if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
                raise ValueError(f"each turn needs 'role' and 'content', got {_shorten(turn)}")
            _check_content(turn["content"])
    return conversations


def vision_kind(part: Mapping[str, Any]) -> str | None:
    """Kind of a part: "image" or "video" for a vision part, None for text."""
    if "image" in part or "image_url" in part or part.get("type") in ("image", "image_url"):
        return "image"
    if "video" in part or part.get("type") == "video":
        return "video"
    return None


def process_vision_info(
    messages: Messages,
    return_video_kwargs: bool = False,
    *,
    edition: Edition = "preview",
    original_size: bool = False,
    workers: int = 1,
    progress: bool = False,
    timeout: float | None = None,
    max_bytes: int | None = None,
) -> tuple[Any, ...]:
    """Loads and resizes every picture and video in the conversations, in order.

    Args:
        messages: one conversation, or a list of them.
        return_video_kwargs: "preview" only: also return the keyword arguments for the processor.
        edition: whose rules apply; ``KeyeProcessor.edition`` is the right one for a checkpoint.
        original_size: "1.5" only: leave the frames of video files in their size, as the official package does; needed
            for other processors than :class:`KeyeProcessor`, which gives the same result with less memory.
        workers: pictures and videos loaded at the same time.
        progress: show a progress bar.
        timeout: seconds that each download may take; by default 30 for a picture, 300 for a video.
        max_bytes: size that each download may have; by default 256 MiB for a picture, 4 GiB for a video.

    Returns:
        ``(images, videos)`` or, with ``return_video_kwargs`` and always for "1.5", ``(images, videos, kwargs)``.
        ``images`` is a list of RGB pictures, ``videos`` a list over videos; each is None where there are none.
        "preview": a video is uint8 ``[N, 3, H, W]`` or, given as pictures, a list of pictures, the last one repeated to
        an even count; ``kwargs = {"fps": [...]}``, frames a second of each video. "1.5": a video is uint8
        ``[N, 3, H, W]``, or a list of uint8 ``[3, h, w]`` where slow and fast frames were shrunk to different sizes;
        ``kwargs`` has ``height``, ``width``, ``fast_height``, ``fast_width``, ``timestamps`` and ``frame_types``, each
        a list over videos. Other than in the official package, ``timestamps`` has None for a video without times, so
        that the lists stay aligned.

    Raises:
        ValueError, TypeError, FileNotFoundError: a part that cannot be loaded; the message names its source.
    """
    check_edition(edition)
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(f"workers must be a positive integer, got {workers!r}")
    limits = {name: limit for name, limit in (("timeout", timeout), ("max_bytes", max_bytes)) if limit is not None}

    def fetch(part: Mapping[str, Any]) -> Any:
        if vision_kind(part) == "image":
            return fetch_image(part, edition=edition, **limits)
        return fetch_video(part, edition=edition, original_size=original_size, **limits)

    parts = _vision_parts(messages)
    fetched = _map(fetch, parts, workers, progress)
    images = [item for item in fetched if not isinstance(item, SampledVideo)] or None
    sampled = [item for item in fetched if isinstance(item, SampledVideo)]
    videos = [video.frames for video in sampled] or None
    if edition == "1.5":
        sizes = [(*video.slow_size, *video.fast_size) for video in sampled]
        columns = zip(*sizes, strict=True) if sizes else [()] * 4
        kwargs = dict(zip(("height", "width", "fast_height", "fast_width"), map(list, columns), strict=True))
        kwargs["timestamps"] = [video.seconds for video in sampled]
        kwargs["frame_types"] = [video.frame_types for video in sampled]
        return images, videos, kwargs
    if return_video_kwargs:
        return images, videos, {"fps": [video.fps for video in sampled]}
    return images, videos


def _map(function: Callable[[Any], Any], items: Sequence[Any], workers: int, progress: bool) -> list[Any]:
    """``function`` of each item, in order; the first error ends it."""
    if not progress and (workers == 1 or len(items) < 2):
        return [function(item) for item in items]
    from tqdm import tqdm

    # Decoding and resizing release the GIL, so threads are enough.
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            for future in tqdm(as_completed(futures), total=len(futures), disable=not progress, unit="file"):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


def _vision_parts(messages: Messages) -> list[Mapping[str, Any]]:
    return [
        part
        for conversation in split_conversations(messages)
        for turn in conversation
        if isinstance(turn["content"], (list, tuple))
        for part in turn["content"]
        if vision_kind(part)
    ]


def _check_content(content: Any) -> None:
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, (list, tuple)):
        raise TypeError(f"content must be a string or a list of parts, got {type(content).__name__}")
    for part in content:
        if not isinstance(part, Mapping) or not ("text" in part or vision_kind(part)):
            raise ValueError(f"a part of content must have one of 'text', {VISION_KEYS}, got {_shorten(part)}")


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:120] + "..."
