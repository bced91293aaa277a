"""The pictures and videos of conversations, as ``keye_vl_utils.process_vision_info`` returns them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .arguments import DEFAULT_FPS
from .images import DOWNLOAD_TIMEOUT, MAX_DOWNLOAD_BYTES, Edition, check_edition, fetch_image

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
    timeout: float = DOWNLOAD_TIMEOUT,
    max_bytes: int = MAX_DOWNLOAD_BYTES,
) -> tuple[Any, ...]:
    """Loads and resizes every picture and video in the conversations, in order.

    Args:
        messages: one conversation, or a list of them.
        return_video_kwargs: "preview" only: also return the keyword arguments for the processor.
        edition: whose rules apply; ``KeyeProcessor.edition`` is the right one for a checkpoint.
        timeout: seconds that each download may take.
        max_bytes: size that each download may have.

    Returns:
        ``(images, videos)`` or, with ``return_video_kwargs`` and always for "1.5", ``(images, videos, kwargs)``.
        ``images`` is a list of RGB pictures, ``videos`` a list over videos; each is None where there are none.
        "preview": a video given as pictures is a list of pictures, the last one repeated to an even count, and
        ``kwargs = {"fps": [...]}``, frames a second of each video. "1.5": ``kwargs`` has ``height``, ``width``,
        ``fast_height``, ``fast_width``, ``timestamps`` and ``frame_types``, each a list over videos.

    Raises:
        ValueError, TypeError, FileNotFoundError: a part that cannot be loaded; the message names its source.
    """
    check_edition(edition)
    limits = {"edition": edition, "timeout": timeout, "max_bytes": max_bytes}
    images: list[Any] = []
    videos: list[Any] = []
    fps: list[float] = []
    for part in _vision_parts(messages):
        if vision_kind(part) == "image":
            images.append(fetch_image(part, **limits))
        elif edition == "1.5":
            raise ValueError("videos are not read for edition '1.5' yet; pass frames to the processor directly")
        else:
            frames, frames_per_second = _fetch_frame_list(part, **limits)
            videos.append(frames)
            fps.append(frames_per_second)
    if edition == "1.5":
        names = ("height", "width", "fast_height", "fast_width", "timestamps", "frame_types")
        return images or None, videos or None, {name: [] for name in names}
    if return_video_kwargs:
        return images or None, videos or None, {"fps": fps}
    return images or None, videos or None


def _fetch_frame_list(part: Mapping[str, Any], **limits: Any) -> tuple[list[Any], float]:
    frames = part.get("video")
    if not isinstance(frames, (list, tuple)):
        raise ValueError("a video must be a list of pictures; video files are not read yet")
    if not frames:
        raise ValueError("a video must have at least one frame, got an empty list")
    fps = part.get("fps", DEFAULT_FPS)
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps < float("inf"):
        raise ValueError(f"fps must be a positive number, got {fps!r}")
    options = {name: value for name, value in part.items() if name not in ("type", "video")}
    pictures = [fetch_image({**options, "image": frame}, **limits) for frame in frames]
    if len(pictures) % 2:
        pictures.append(pictures[-1])
    return pictures, float(fps)


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
