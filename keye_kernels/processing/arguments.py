"""Normalizes the processor's arguments: one value, a list, or a nested list becomes a list over prompts, images or videos."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .sampling import DEFAULT_FPS

# 1 / fps must be finite in float32.
MIN_FPS = 1e-37


def list_prompts(text: str | Sequence[str]) -> list[str]:
    """Returns one or several prompts as a list; raises TypeError or ValueError if there are none or one is empty."""
    prompts = [text] if isinstance(text, str) else text
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"text must be a string or a list of strings, got {type(text).__name__}")
    if not prompts:
        raise ValueError("text must hold at least one prompt, got an empty list")
    for index, prompt in enumerate(prompts):
        if not prompt.strip():
            raise ValueError(f"text[{index}] is empty; a prompt needs at least one token")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text[{index}] has a character that UTF-8 cannot encode: {error}") from error
    return list(prompts)


def list_images(images: Any) -> list[Any]:
    """Returns None, one image, a list of images, or a list of images per prompt as one flat list."""
    if images is None:
        return []
    if isinstance(images, (torch.Tensor, np.ndarray)):
        return list(images) if images.ndim == 4 else [images]
    if not isinstance(images, (list, tuple)):
        return [images]
    return [image for item in images for image in (item if isinstance(item, (list, tuple)) else [item])]


def list_videos(videos: Any) -> list[Any]:
    """Returns None, one video or several videos as a list; a list of images is one video."""
    if videos is None:
        return []
    if isinstance(videos, (torch.Tensor, np.ndarray)):
        return list(videos) if videos.ndim == 5 else [videos]
    if not isinstance(videos, (list, tuple)):
        raise TypeError(f"videos must be a list of videos, got {type(videos).__name__}")
    if videos and all(not isinstance(item, (list, tuple)) and getattr(item, "ndim", 3) in (2, 3) for item in videos):
        return [list(videos)]
    return list(videos)


def check_placeholders(modality: str, placeholder: str, prompts: Sequence[str], given: int) -> None:
    """Raises ValueError if the number of placeholders in the prompts differs from the number of images or videos."""
    found = sum(prompt.count(placeholder) for prompt in prompts)
    if found != given:
        raise ValueError(
            f"text holds {found} {modality} placeholders ({placeholder}), but {given} {modality}s were given; "
            "pass one for each, in order"
        )


def replace_placeholders(prompts: Sequence[str], placeholder: str, replacements: Sequence[str]) -> list[str]:
    """Replaces the n-th placeholder, counted over all prompts, by `replacements[n]`."""
    remaining = iter(replacements)
    replaced = []
    for prompt in prompts:
        first, *rest = prompt.split(placeholder)
        replaced.append(first + "".join(next(remaining) + piece for piece in rest))
    return replaced


def repeat_ids(ids: Sequence[int], repeats: Mapping[int, Iterator[int]]) -> list[int]:
    """Repeats each id that is a key of `repeats` as often as the next value of its iterator.

    Placeholders are special tokens, so repeating an id is the same as encoding the repeated text.
    """
    repeated: list[int] = []
    for token_id in ids:
        repeated.extend([token_id] * next(repeats[token_id]) if token_id in repeats else [token_id])
    return repeated


def align_timestamps(timestamps: Any, num_frames: Sequence[int]) -> Any:
    """Inserts None into a list of timestamps for each video that has none; `keye_vl_utils` 1.5 leaves those videos out.

    They are found by comparing the numbers of timestamps with `num_frames` of each video. Raises ValueError if the timestamps fit
    none or several choices of videos.
    """
    if not isinstance(timestamps, (list, tuple)) or not timestamps or isinstance(timestamps[0], (int, float)):
        return timestamps
    if len(timestamps) >= len(num_frames) or any(times is None for times in timestamps):
        return timestamps
    lengths = [len(times) for times in timestamps]
    leftmost = _match_lengths(lengths, num_frames)
    rightmost = [len(num_frames) - 1 - index for index in reversed(_match_lengths(lengths[::-1], num_frames[::-1]))]
    # The leftmost and the rightmost match are equal only if there is no other match.
    if len(leftmost) != len(lengths) or leftmost != rightmost:
        raise ValueError(
            f"timestamps must hold one entry (or None) for each of the {len(num_frames)} videos, got {len(lengths)}; "
            f"the videos have {list(num_frames)} frames, the entries {lengths} timestamps"
        )
    timestamps_by_video = dict(zip(leftmost, timestamps, strict=True))
    return [timestamps_by_video.get(index) for index in range(len(num_frames))]


def _match_lengths(lengths: Sequence[int], num_frames: Sequence[int]) -> list[int]:
    """Returns the leftmost videos with these numbers of frames, in order; fewer if some have no match."""
    matches: list[int] = []
    for index, count in enumerate(num_frames):
        if len(matches) < len(lengths) and count == lengths[len(matches)]:
            matches.append(index)
    return matches


def per_video(name: str, value: Any, count: int, *, nested: bool) -> list[Any]:
    """Converts a keyword argument (None, one value for all videos, or a list) to a list with one entry per video.

    `nested`: the value of a video is itself a sequence, with one entry per frame. Raises ValueError for a list of another length.
    """
    if isinstance(value, torch.Tensor):
        axes = 2 if nested else 1
        if value.ndim > axes:
            raise ValueError(f"{name} must have at most {axes} axes, got a tensor of shape {list(value.shape)}")
        value = list(value) if value.ndim == axes else [value] if nested else value.item()
    # keye_vl_utils 1.5 leaves out timestamps of videos without times, which may be all of them.
    if value is None or (isinstance(value, (list, tuple)) and not value and (name == "timestamps" or not count)):
        return [None] * count
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if nested and value and isinstance(value[0], (int, float)):
        value = [value]
    if len(value) != count:
        raise ValueError(f"{name} must hold one entry for each of the {count} videos, got {len(value)}")
    return list(value)


def frame_size(height_name: str, width_name: str, options: Mapping[str, Any]) -> tuple[int, int] | None:
    """Returns `(height, width)` from the options of a video, or None if both are None."""
    height, width = options[height_name], options[width_name]
    if (height is None) != (width is None):
        raise ValueError(f"{height_name} and {width_name} must be given together")
    if height is None:
        return None
    for name, value in ((height_name, height), (width_name, width)):
        is_number = isinstance(value, (int, float, torch.Tensor)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value != int(value):
            raise ValueError(f"{name} must be an integer, got {value!r}")
    return int(height), int(width)


def seconds_per_grid(fps: Any, count: int) -> torch.Tensor:
    """Computes the seconds between frames, float32 `[count]`, from one frame rate, one per video, or None for the default."""
    rates = [DEFAULT_FPS if rate is None else rate for rate in per_video("fps", fps, count, nested=False)]
    for rate in rates:
        is_number = isinstance(rate, (int, float, np.number, torch.Tensor)) and not isinstance(rate, bool)
        if not is_number or not MIN_FPS <= rate < math.inf:
            raise ValueError(f"fps must be a positive number, got {rate!r}")
    return torch.tensor([1.0 / float(rate) for rate in rates], dtype=torch.float32)
