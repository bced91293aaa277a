"""What callers may pass to the processor, brought into one form: lists over prompts, pictures and videos."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .sampling import DEFAULT_FPS


def list_prompts(text: str | Sequence[str]) -> list[str]:
    """One prompt or several as a list; an empty one is an error."""
    prompts = [text] if isinstance(text, str) else text
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"text must be a string or a list of strings, got {type(text).__name__}")
    if not prompts:
        raise ValueError("text must hold at least one prompt, got an empty list")
    for index, prompt in enumerate(prompts):
        if not prompt.strip():
            raise ValueError(f"text[{index}] is empty; a prompt needs at least one token")
    return list(prompts)


def list_images(images: Any) -> list[Any]:
    """None, one picture, pictures, or a list of pictures for each prompt, as one flat list."""
    if images is None:
        return []
    if isinstance(images, (torch.Tensor, np.ndarray)):
        return list(images) if images.ndim == 4 else [images]
    if not isinstance(images, (list, tuple)):
        return [images]
    return [image for item in images for image in (item if isinstance(item, (list, tuple)) else [item])]


def list_videos(videos: Any) -> list[Any]:
    """None, one video or videos as a list; a list of pictures is one video."""
    if videos is None:
        return []
    if isinstance(videos, (torch.Tensor, np.ndarray)):
        return list(videos) if videos.ndim == 5 else [videos]
    if not isinstance(videos, (list, tuple)):
        raise TypeError(f"videos must be a list of videos, got {type(videos).__name__}")
    if videos and all(not isinstance(item, (list, tuple)) and getattr(item, "ndim", 3) == 3 for item in videos):
        return [list(videos)]
    return list(videos)


def check_count(kind: str, placeholder: str, prompts: Sequence[str], given: int) -> None:
    """Raises ValueError unless the prompts hold as many placeholders as pictures or videos were given."""
    found = sum(prompt.count(placeholder) for prompt in prompts)
    if found != given:
        raise ValueError(
            f"text holds {found} {kind} placeholders ({placeholder}), but {given} {kind}s were given; "
            "pass one for each, in order"
        )


def expand(prompts: Sequence[str], placeholder: str, replacements: Sequence[str]) -> list[str]:
    """The prompts with the n-th placeholder, counted over all of them, replaced by ``replacements[n]``."""
    remaining = iter(replacements)
    expanded = []
    for prompt in prompts:
        first, *rest = prompt.split(placeholder)
        expanded.append(first + "".join(next(remaining) + piece for piece in rest))
    return expanded


def repeat_ids(ids: Sequence[int], repeats: Mapping[int, Iterator[int]]) -> list[int]:
    """The ids with each one in ``repeats`` written as often as its iterator says next.

    Placeholders are special tokens, so encoding one and repeating its id equals encoding the repeated text.
    """
    repeated: list[int] = []
    for token_id in ids:
        repeated.extend([token_id] * next(repeats[token_id]) if token_id in repeats else [token_id])
    return repeated


def align_timestamps(timestamps: Any, num_frames: Sequence[int]) -> Any:
    """Timestamps of several videos with None put where ``keye_vl_utils`` 1.5 left a video's out.

    Args:
        timestamps: as passed to the processor; returned unchanged unless it is a list shorter than the videos.
        num_frames: frames of each video.

    Raises:
        ValueError: the lengths do not tell which videos they belong to.
    """
    if not isinstance(timestamps, (list, tuple)) or not timestamps or isinstance(timestamps[0], (int, float)):
        return timestamps
    if len(timestamps) >= len(num_frames) or any(times is None for times in timestamps):
        return timestamps
    lengths = [len(times) for times in timestamps]
    first = _places(lengths, num_frames)
    last = [len(num_frames) - 1 - place for place in reversed(_places(lengths[::-1], num_frames[::-1]))]
    # The leftmost and the rightmost match agree only where there is no other.
    if len(first) != len(lengths) or first != last:
        raise ValueError(
            f"timestamps must hold one entry (or None) for each of the {len(num_frames)} videos, got {len(lengths)}; "
            f"videos have {list(num_frames)} frames, timestamps {lengths} times"
        )
    times_of = dict(zip(first, timestamps, strict=True))
    return [times_of.get(index) for index in range(len(num_frames))]


def _places(lengths: Sequence[int], num_frames: Sequence[int]) -> list[int]:
    """Leftmost videos that have these numbers of frames, in order; fewer if some cannot be placed."""
    places: list[int] = []
    for place, count in enumerate(num_frames):
        if len(places) < len(lengths) and count == lengths[len(places)]:
            places.append(place)
    return places


def per_video(name: str, value: Any, count: int, *, nested: bool) -> list[Any]:
    """A keyword argument as a list over videos, with None for each video where it was not given.

    Args:
        name: for the error.
        value: None, one value for all videos, or a list over videos.
        count: number of videos.
        nested: each video's value is itself a sequence, one entry a frame.
    """
    if isinstance(value, torch.Tensor):
        value = list(value) if value.ndim == (2 if nested else 1) else [value] if nested else value.item()
    if value is None or (isinstance(value, (list, tuple)) and not value):
        return [None] * count
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if nested and isinstance(value[0], (int, float)):
        value = [value]
    if len(value) != count:
        raise ValueError(f"{name} must hold one entry for each of the {count} videos, got {len(value)}")
    return list(value)


def frame_size(height_name: str, width_name: str, options: Mapping[str, Any]) -> tuple[int, int] | None:
    """``(height, width)`` from a video's options, None if neither is given."""
    height, width = options[height_name], options[width_name]
    if (height is None) != (width is None):
        raise ValueError(f"{height_name} and {width_name} must be given together")
    return None if height is None else (int(height), int(width))


def seconds_per_grid(fps: Any, count: int) -> torch.Tensor:
    """Seconds between frames, float32 ``[videos]``, of frame rates given as one number, one a video, or not at all."""
    rates = [DEFAULT_FPS if rate is None else float(rate) for rate in per_video("fps", fps, count, nested=False)]
    for rate in rates:
        if not 0 < rate < float("inf"):
            raise ValueError(f"fps must be positive, got {rate}")
    return torch.tensor([1.0 / rate for rate in rates], dtype=torch.float32)
