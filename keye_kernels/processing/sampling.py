"""Which frames of a video the model sees, and how large: the rules of ``keye_vl_utils`` 1.0 (Preview) and 1.5.

Pure arithmetic; :mod:`keye_kernels.processing.videos` applies it. ``options`` is the message part with the video.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch

from .images import PIXELS_PER_TOKEN, resized_size
from .resize import smart_resize

Options = Mapping[str, Any]

DEFAULT_FPS = 2.0
# One frame a day, for time-lapses, to faster than any camera's clip is worth reading.
FPS_LIMITS = (1e-5, 1000.0)

PREVIEW_MIN_PIXELS = 128 * PIXELS_PER_TOKEN
PREVIEW_MAX_PIXELS = 768 * PIXELS_PER_TOKEN
PREVIEW_TOTAL_PIXELS = int(128000 * PIXELS_PER_TOKEN * 0.9)
PREVIEW_MIN_FRAMES, PREVIEW_MAX_FRAMES = 4, 768
FRAME_FACTOR = 2

MIN_TOKENS, MAX_TOKENS, TOTAL_TOKENS = 48, 768, 65536
FRAME_PIXEL_LIMITS = (MIN_TOKENS * PIXELS_PER_TOKEN, MAX_TOKENS * PIXELS_PER_TOKEN)
FAST_TOKEN_RATIO = 0.3
MIN_FRAME_SIMILARITY = 0.9

Size = tuple[int, int]


def check_options(options: Options) -> None:
    """Raises ValueError for a video option out of range; the message names it."""
    for name in ("nframes", "min_frames", "max_frames", "min_pixels", "max_pixels"):
        _check_number(options, name, lambda value: 0 < value < math.inf, "a positive number")
    for name in ("total_pixels", "video_total_pixels", "resized_height", "resized_width"):
        _check_number(options, name, lambda value: 0 < value < math.inf, "a positive number")
    for name in ("video_start", "video_end", "min_frame_similarity"):
        _check_number(options, name, math.isfinite, "a number")
    low, high = FPS_LIMITS
    _check_number(options, "fps", lambda value: low <= value <= high, f"a number from {low} to {high:.0f}")
    if options.get("fps") is not None and options.get("nframes") is not None:
        raise ValueError("fps and nframes cannot both be given; one decides the number of frames")


def frame_range(options: Options, total_frames: int, video_fps: float) -> tuple[int, int]:
    """First and last frame that ``video_start`` and ``video_end`` (seconds) leave, of a constant-rate video.

    Raises:
        ValueError: nothing is left.
    """
    duration = total_frames / video_fps
    start, end = options.get("video_start"), options.get("video_end")
    first = 0 if start is None else math.ceil(max(0.0, min(start, duration)) * video_fps)
    last = total_frames - 1
    if end is not None:
        last = min(math.floor(max(0.0, min(end, duration)) * video_fps), last)
    check_range(options, first, last, duration)
    return first, last


def check_range(options: Options, first: int, last: int, duration: float) -> None:
    """Raises ValueError unless ``video_start`` to ``video_end`` holds a frame."""
    if first > last:
        raise ValueError(
            f"video_start={options.get('video_start')} to video_end={options.get('video_end')} holds no frame; "
            f"the video lasts {duration:.2f} seconds"
        )


def sample_indices(first: int, last: int, count: int) -> list[int]:
    """``count`` frame numbers spread evenly from ``first`` to ``last``."""
    return torch.linspace(first, last, count).round().long().tolist()


def preview_frame_count(options: Options, total_frames: int, video_fps: float) -> int:
    """Frames that Preview samples: an even number.

    Raises:
        ValueError: the video has less than the 2 frames that are the least, or than ``nframes``.
    """
    if options.get("nframes") is not None:
        count = round(options["nframes"] / FRAME_FACTOR) * FRAME_FACTOR
    else:
        least = _get(options, "min_frames", PREVIEW_MIN_FRAMES)
        most = _get(options, "max_frames", min(PREVIEW_MAX_FRAMES, total_frames))
        count = total_frames / video_fps * _get(options, "fps", DEFAULT_FPS)
        count = min(max(count, _ceil_even(least)), _floor_even(most), total_frames)
        count = _floor_even(count)
    if not FRAME_FACTOR <= count <= total_frames:
        raise ValueError(
            f"the number of sampled frames must be from {FRAME_FACTOR} to the {total_frames} frames of the video, "
            f"got {count}; change nframes, min_frames or max_frames"
        )
    return count


def preview_frame_size(options: Options, num_frames: int, height: int, width: int) -> Size:
    """``(height, width)`` of a Preview video's frames.

    ``total_pixels`` limits the whole video; where it is not given, the environment variable ``VIDEO_MAX_PIXELS`` does.
    """
    if options.get("resized_height") is not None or options.get("resized_width") is not None:
        return resized_size(options, height, width, edition="preview")
    min_pixels = _get(options, "min_pixels", PREVIEW_MIN_PIXELS)
    total = options.get("total_pixels")
    if total is None:
        total = int(float(os.environ.get("VIDEO_MAX_PIXELS", PREVIEW_TOTAL_PIXELS)))
    max_pixels = max(min(PREVIEW_MAX_PIXELS, total / num_frames * FRAME_FACTOR), int(min_pixels * 1.05))
    max_pixels = min(_get(options, "max_pixels", max_pixels), max_pixels)
    return smart_resize(height, width, min_pixels=min_pixels, max_pixels=max_pixels)


def slow_fast_frame_count(options: Options, total_frames: int, video_fps: float) -> int:
    """Frames that 1.5 samples; 0 for a clip shorter than ``1 / fps``, of which the reader then takes one frame."""
    fps = min(_get(options, "fps", DEFAULT_FPS), video_fps)
    return min(int(total_frames / video_fps * fps), slow_fast_frame_limit(options))


def slow_fast_frame_limit(options: Options) -> int:
    """Most frames that 1.5's total budget allows, each of the smallest size."""
    total = _get(options, "video_total_pixels", TOTAL_TOKENS * PIXELS_PER_TOKEN)
    limit = int(total / _get(options, "min_pixels", FRAME_PIXEL_LIMITS[0]))
    return int(min(_get(options, "max_frames", limit), limit))


def slow_fast_sizes(options: Options, height: int, width: int, slow_frames: int, fast_frames: int) -> tuple[Size, Size]:
    """Sizes of slow and of fast frames: the largest that keep the video within its total budget.

    As in the official package the search ends one token above the largest slow frame that fits.

    Args:
        options: may have ``min_pixels``, ``max_pixels`` (of a frame) and ``video_total_pixels``.
        height, width: size of the video's frames.
        slow_frames, fast_frames: how many there are of each.

    Returns:
        ``((height, width), (fast_height, fast_width))``.
    """
    min_pixels = max(int(_get(options, "min_pixels", 0)), FRAME_PIXEL_LIMITS[0])
    total = _get(options, "video_total_pixels", TOTAL_TOKENS * PIXELS_PER_TOKEN)
    min_tokens = min_pixels // PIXELS_PER_TOKEN

    def estimate(tokens: int) -> int:
        fast_tokens = max(int(FAST_TOKEN_RATIO * tokens), min_tokens)
        return (slow_frames * tokens + fast_frames * fast_tokens) * PIXELS_PER_TOKEN

    low = min_pixels / PIXELS_PER_TOKEN
    high = _get(options, "max_pixels", FRAME_PIXEL_LIMITS[1]) / PIXELS_PER_TOKEN
    while low < high:
        middle = int(low + high) // 2
        if estimate(middle) > total:
            high = middle
        else:
            low = middle + 1
    slow = smart_resize(height, width, min_pixels=min_pixels, max_pixels=low * PIXELS_PER_TOKEN)
    fast_tokens = int(slow[0] * slow[1] / PIXELS_PER_TOKEN * FAST_TOKEN_RATIO)
    fast_max_pixels = max(fast_tokens * PIXELS_PER_TOKEN, FRAME_PIXEL_LIMITS[0])
    return slow, smart_resize(height, width, min_pixels=min_pixels, max_pixels=fast_max_pixels)


def _get(options: Options, name: str, default: float) -> float:
    value = options.get(name)
    return default if value is None else value


def _check_number(options: Options, name: str, accepts: Any, expected: str) -> None:
    value = options.get(name)
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not accepts(value):
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def _ceil_even(value: float) -> int:
    return math.ceil(value / FRAME_FACTOR) * FRAME_FACTOR


def _floor_even(value: float) -> int:
    return math.floor(value / FRAME_FACTOR) * FRAME_FACTOR
