"""Rules for the number, the indices and the sizes of sampled video frames, as in `keye_vl_utils` 1.0 (Preview) and 1.5.

Pure arithmetic, applied by `keye_kernels.processing.videos`. `options` is the message part with the video. The rules are in
docs/models/keye_vl_preview.md, "Video", and docs/models/keye_vl_1_5.md, "Sampling a video" and "Sizes of slow and fast frames".
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from keye_kernels.editions import PIXELS_PER_TOKEN

from .images import check_pixel_limits, size_from_options
from .resize import smart_resize

Options = Mapping[str, Any]
Size = tuple[int, int]

DEFAULT_FPS = 2.0
# From one frame per day, for time-lapse videos, to more than any camera records.
FPS_LIMITS = (1e-5, 1000.0)
# Of all sampled frames of a video, 3 bytes each; the default budgets are at most a sixth of it.
MAX_VIDEO_PIXELS = 2**30

# Preview
PREVIEW_MIN_PIXELS = 128 * PIXELS_PER_TOKEN
PREVIEW_MAX_PIXELS = 768 * PIXELS_PER_TOKEN
PREVIEW_TOTAL_PIXELS = int(128000 * PIXELS_PER_TOKEN * 0.9)
PREVIEW_MIN_FRAMES, PREVIEW_MAX_FRAMES = 4, 768
FRAME_FACTOR = 2

# 1.5
FRAME_PIXEL_LIMITS = (48 * PIXELS_PER_TOKEN, 768 * PIXELS_PER_TOKEN)
TOTAL_PIXELS = 65536 * PIXELS_PER_TOKEN
FAST_TOKEN_RATIO = 0.3
MIN_FRAME_SIMILARITY = 0.9


def check_options(options: Options) -> None:
    """Raises ValueError for a video option out of range; the message names it."""
    for name in ("total_pixels", "video_total_pixels"):
        _check_number(options, name, lambda value: 1 <= value <= MAX_VIDEO_PIXELS, f"positive and at most {MAX_VIDEO_PIXELS}")
    for name in ("nframes", "min_frames", "max_frames"):
        _check_number(options, name, lambda value: 0 < value < math.inf, "a positive number")
    for name in ("min_pixels", "max_pixels", "resized_height", "resized_width"):
        _check_number(options, name, lambda value: 1 <= value < math.inf, "a positive number of at least 1")
    for name in ("video_start", "video_end", "min_frame_similarity"):
        _check_number(options, name, math.isfinite, "a number")
    check_pixel_limits(options)
    low, high = FPS_LIMITS
    _check_number(options, "fps", lambda value: low <= value <= high, f"a number from {low} to {high:.0f}")
    if options.get("fps") is not None and options.get("nframes") is not None:
        raise ValueError("fps and nframes cannot be given together; each sets the number of frames")


def frame_range(options: Options, total_frames: int, video_fps: float) -> tuple[int, int]:
    """Computes the first and last frame, both included, from `video_start` to `video_end` at a constant frame rate."""
    duration = total_frames / video_fps
    start, end = options.get("video_start"), options.get("video_end")
    first = 0 if start is None else math.ceil(max(0.0, min(start, duration)) * video_fps)
    last = total_frames - 1
    if end is not None:
        last = min(math.floor(max(0.0, min(end, duration)) * video_fps), last)
    check_range(options, first, last, duration)
    return first, last


def check_range(options: Options, first: int, last: int, duration: float) -> None:
    """Raises ValueError if there is no frame between `video_start` and `video_end`."""
    if first > last:
        raise ValueError(
            f"video_start={options.get('video_start')} to video_end={options.get('video_end')} holds no frame; "
            f"the video lasts {duration:.2f} seconds"
        )


def sample_indices(first: int, last: int, count: int) -> list[int]:
    """Returns `count` frame indices, evenly spaced from `first` to `last`."""
    return torch.linspace(first, last, count).round().long().tolist()


def preview_frame_count(options: Options, total_frames: int, video_fps: float) -> int:
    """Computes the number of frames that Preview samples out of `total_frames`, an even number.

    Options: `nframes`, or `fps`, `min_frames` and `max_frames`. Raises ValueError if the range has fewer than 2 or `nframes`
    frames.
    """
    if options.get("nframes") is not None:
        count = _round_even(options["nframes"], round)
    else:
        min_frames = _get(options, "min_frames", PREVIEW_MIN_FRAMES)
        max_frames = _get(options, "max_frames", min(PREVIEW_MAX_FRAMES, total_frames))
        wanted = max(total_frames / video_fps * _get(options, "fps", DEFAULT_FPS), _round_even(min_frames, math.ceil))
        count = _round_even(min(wanted, _round_even(max_frames, math.floor), total_frames), math.floor)
    if not FRAME_FACTOR <= count <= total_frames:
        raise ValueError(
            f"the number of sampled frames must be from {FRAME_FACTOR} to the {total_frames} frames of the video, "
            f"got {count}; change nframes, min_frames or max_frames"
        )
    return count


def preview_frame_size(options: Options, num_frames: int, height: int, width: int) -> Size:
    """Computes `(height, width)` of the resized frames of a Preview video.

    Options: `resized_height` and `resized_width`, or `min_pixels` and `max_pixels` per frame and `total_pixels` of the video. The
    environment variable `VIDEO_MAX_PIXELS` sets the default of `total_pixels`.
    """
    if options.get("resized_height") is not None or options.get("resized_width") is not None:
        return size_from_options(options, height, width, edition="preview")
    min_pixels = _get(options, "min_pixels", PREVIEW_MIN_PIXELS)
    total = options.get("total_pixels")
    if total is None:
        total = int(float(os.environ.get("VIDEO_MAX_PIXELS", PREVIEW_TOTAL_PIXELS)))
    max_pixels = max(min(PREVIEW_MAX_PIXELS, total / num_frames * FRAME_FACTOR), int(min_pixels * 1.05))
    max_pixels = min(_get(options, "max_pixels", max_pixels), max_pixels)
    size = smart_resize(height, width, min_pixels=min_pixels, max_pixels=max_pixels)
    if num_frames * size[0] * size[1] > MAX_VIDEO_PIXELS:
        raise ValueError(
            f"{num_frames} frames of {size[0]}x{size[1]} pixels exceed {MAX_VIDEO_PIXELS} pixels; reduce min_pixels or the frames"
        )
    return size


def slow_fast_frame_count(options: Options, total_frames: int, video_fps: float) -> int:
    """Computes the number of frames that 1.5 samples; 0 for a clip shorter than `1 / fps` seconds."""
    fps = min(_get(options, "fps", DEFAULT_FPS), video_fps)
    return min(int(total_frames / video_fps * fps), slow_fast_frame_limit(options))


def slow_fast_frame_limit(options: Options) -> int:
    """Computes how many frames of the smallest size fit into the pixel budget of a 1.5 video, at most `max_frames`."""
    total = _get(options, "video_total_pixels", TOTAL_PIXELS)
    limit = int(total / _get(options, "min_pixels", FRAME_PIXEL_LIMITS[0]))
    return int(min(_get(options, "max_frames", limit), limit))


def slow_fast_sizes(options: Options, height: int, width: int, slow_frames: int, fast_frames: int) -> tuple[Size, Size]:
    """Computes the sizes `(height, width)` of slow and fast frames, the largest that fit the pixel budget of the video.

    Options: `min_pixels` and `max_pixels` per frame, `video_total_pixels` of the video. As in the official package, the search
    ends one token above the largest slow frame that fits.
    """
    min_pixels = max(int(_get(options, "min_pixels", 0)), FRAME_PIXEL_LIMITS[0])
    total = _get(options, "video_total_pixels", TOTAL_PIXELS)
    min_tokens = min_pixels // PIXELS_PER_TOKEN

    def video_pixels(slow_tokens: int) -> int:
        fast_tokens = max(int(FAST_TOKEN_RATIO * slow_tokens), min_tokens)
        return (slow_frames * slow_tokens + fast_frames * fast_tokens) * PIXELS_PER_TOKEN

    low = min_pixels / PIXELS_PER_TOKEN
    high = _get(options, "max_pixels", FRAME_PIXEL_LIMITS[1]) / PIXELS_PER_TOKEN
    while low < high:
        middle = int(low + high) // 2
        if video_pixels(middle) > total:
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


def _check_number(options: Options, name: str, is_valid: Callable[[float], bool], expected: str) -> None:
    value = options.get(name)
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not is_valid(value):
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def _round_even(value: float, rounding: Callable[[float], int]) -> int:
    return rounding(value / FRAME_FACTOR) * FRAME_FACTOR
