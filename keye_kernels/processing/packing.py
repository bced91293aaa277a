"""Keye-VL-1.5 videos: resizes slow and fast frames, packs their patches in time order, and builds the video's prompt.

Symbols: N frames, P patches, h and w rows and columns of patches. Agrees with the processor of transformers pull request
41040 and with vLLM; see docs/models/keye_vl_1_5.md, "Processor".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch

from keye_kernels.editions import V1_5

from .arguments import align_timestamps, frame_size, per_video
from .patches import PatchConfig
from .sampling import Size
from .slow_fast import FAST, SLOW
from .tokenizer import FAST_END, FAST_START, FRAME, VIDEO_PAD

# Video arguments with one entry per frame
PER_FRAME_KWARGS = ("timestamps", "frame_types")


@dataclass(frozen=True)
class PackedVideo:
    """One video: how its frames become the model's input."""

    frames: list[tuple[torch.Tensor, Size]]  # uint8 [3, H, W], and (height, width) to which it is resized
    lengths: list[int]  # patches of each frame
    grid_thw: list[tuple[int, int, int]]  # (frames, h, w) for each run of consecutive frames of equal size
    tokens: list[int]  # [N], vision tokens per frame
    prompt: str  # replaces <|video_pad|>; has one placeholder per frame


def pack_videos(
    videos: Sequence[Sequence[torch.Tensor]], config: PatchConfig, video_kwargs: Mapping[str, Any]
) -> list[PackedVideo]:
    """Packs the videos of a batch; a video is a sequence of frames, uint8 `[3, H, W]`.

    `video_kwargs` has the processor's keyword arguments, each a list with one entry per video, or missing. Raises ValueError if
    an argument does not match the videos.
    """
    timestamps = align_timestamps(video_kwargs.get("timestamps"), [len(frames) for frames in videos])
    given = {**video_kwargs, "timestamps": timestamps}
    values = {name: per_video(name, given.get(name), len(videos), nested=name in PER_FRAME_KWARGS) for name in V1_5.video_kwargs}
    packed = []
    for index, frames in enumerate(videos):
        options = {name: value[index] for name, value in values.items()}
        packed.append(
            pack_video(
                frames,
                config,
                slow_size=frame_size("height", "width", options),
                fast_size=frame_size("fast_height", "fast_width", options),
                frame_types=options["frame_types"],
                timestamps=options["timestamps"],
            )
        )
    return packed


def pack_video(
    frames: Sequence[torch.Tensor],
    config: PatchConfig,
    *,
    slow_size: tuple[int, int] | None = None,
    fast_size: tuple[int, int] | None = None,
    frame_types: Sequence[int] | None = None,
    timestamps: Sequence[float] | None = None,
) -> PackedVideo:
    """Checks the arguments for the N frames of one video, uint8 `[3, H, W]`, and computes its grids and its prompt.

    The sizes are `(height, width)` in pixels, multiples of 28; default: the size to which the image processor resizes the first
    frame. `frame_types` are 0 for slow and 1 for fast (default: all slow), `timestamps` the seconds written into the prompt
    (default: none). Raises ValueError for a size, frame type or number of entries that does not fit the frames.
    """
    types = [float(SLOW)] * len(frames) if frame_types is None else _list_numbers("frame_types", frame_types)
    if len(types) != len(frames) or not set(types) <= {SLOW, FAST}:
        raise ValueError(
            f"frame_types must hold one 0 (slow) or 1 (fast) for each of the {len(frames)} frames, "
            f"got {len(types)} values from {sorted(set(types))}"
        )
    frame_types = [int(frame_type) for frame_type in types]
    times = None if timestamps is None else _list_numbers("timestamps", timestamps)
    if times is not None and len(times) != len(frames):
        raise ValueError(f"timestamps must hold one time for each of the {len(frames)} frames, got {len(times)}")
    if times is not None and not all(0 <= time < math.inf for time in times):
        raise ValueError(f"timestamps must be finite and not negative, got {times}")
    default_size = config.resized_size(*frames[0].shape[-2:])
    sizes = {SLOW: slow_size or default_size, FAST: fast_size or default_size}
    grids = [config.grid(*sizes[frame_type]) for frame_type in frame_types]

    grid_thw = [(len(list(run)), *grid) for grid, run in groupby(grids)]
    lengths = [rows * columns for rows, columns in grids]
    tokens = [length // config.merge_size**2 for length in lengths]
    sized = [(frame, sizes[frame_type]) for frame, frame_type in zip(frames, frame_types, strict=True)]
    return PackedVideo(sized, lengths, grid_thw, tokens, video_prompt(frame_types, times))


def packed_patches(videos: Sequence[PackedVideo], config: PatchConfig, pixel_dtype: str) -> torch.Tensor:
    """Resizes the frames of all videos; returns their patches `[P, 3, 14, 14]`, frame by frame in time order."""

    def read(frame: tuple[torch.Tensor, Size]) -> np.ndarray:
        # Resizing uint8 rounds to whole pixel values, as the official processor does.
        resized = torch.nn.functional.interpolate(frame[0][None], frame[1], mode="bilinear", antialias=True)[0]
        return resized.permute(1, 2, 0).numpy()

    frames = [frame for video in videos for frame in video.frames]
    return config.pack(frames, [length for video in videos for length in video.lengths], read, pixel_dtype)


def _list_numbers(name: str, values: Any) -> list[float]:
    """Returns the numbers in a list, a tuple or a tensor; raises TypeError if there is something else."""
    numbers = values.tolist() if isinstance(values, (torch.Tensor, np.ndarray)) else values
    if not isinstance(numbers, (list, tuple)):
        raise TypeError(f"{name} of a video must be a list of numbers, got {type(values).__name__}")
    for number in numbers:
        is_number = isinstance(number, (int, float, np.number, torch.Tensor)) and not isinstance(number, bool)
        if not is_number or (isinstance(number, torch.Tensor) and number.ndim):
            raise TypeError(f"{name} of a video must be a list of numbers, got one with {type(number).__name__}")
    return [float(number) for number in numbers]


def video_prompt(frame_types: Sequence[int], timestamps: Sequence[float] | None) -> str:
    """Builds the prompt of a video: a marker, the time in seconds and a placeholder per frame."""
    pieces = []
    for index, frame_type in enumerate(frame_types):
        time = "" if timestamps is None else format(float(timestamps[index]), ".1f")
        pieces.append(FRAME + time + (FAST_START + VIDEO_PAD + FAST_END if frame_type == FAST else VIDEO_PAD))
    return "".join(pieces)
