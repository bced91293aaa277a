"""Keye-VL-1.5 videos: slow and fast frames resized, packed in time order, and written into the prompt.

Symbols: N frames, P patches, h and w rows and columns of patches. Source: processor of the transformers pull request
41040 and vLLM, which agree; see :mod:`keye_kernels.processing.patches` for the pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from .patches import PatchConfig
from .slow_fast import FAST, SLOW
from .tokenizer import FAST_END, FAST_START, FRAME, VIDEO_PAD


@dataclass(frozen=True)
class PackedVideo:
    """One video ready for the model.

    Attributes:
        patches: uint8 ``[P, 3, 14, 14]``, frame by frame in time order.
        grid_thw: run-length grids: neighbouring frames of equal size share one row ``(frames, h, w)``.
        tokens: number of placeholders of each of the N frames.
        prompt: what one ``<|video_pad|>`` of the prompt becomes, with one placeholder a frame.
    """

    patches: torch.Tensor
    grid_thw: list[tuple[int, int, int]]
    tokens: list[int]
    prompt: str


def pack_video(
    frames: Sequence[torch.Tensor],
    config: PatchConfig,
    *,
    slow_size: tuple[int, int] | None = None,
    fast_size: tuple[int, int] | None = None,
    frame_types: Sequence[int] | None = None,
    timestamps: Sequence[float] | None = None,
) -> PackedVideo:
    """Resizes and packs one video.

    Args:
        frames: N tensors uint8 ``[3, H, W]``.
        config: patch size, limits and normalisation.
        slow_size, fast_size: ``(height, width)`` in pixels, multiples of 28; by default what the image processor gives
            the first frame.
        frame_types: N numbers, 0 slow and 1 fast; all slow by default.
        timestamps: N times in seconds, or None to leave them out of the prompt.

    Raises:
        ValueError: a size, type or count that does not fit the frames.
    """
    frame_types = [SLOW] * len(frames) if frame_types is None else [int(kind) for kind in frame_types]
    if len(frame_types) != len(frames) or not set(frame_types) <= {SLOW, FAST}:
        raise ValueError(
            f"frame_types must hold one 0 (slow) or 1 (fast) for each of the {len(frames)} frames, "
            f"got {len(frame_types)} values from {sorted(set(frame_types))}"
        )
    if timestamps is not None and len(timestamps) != len(frames):
        raise ValueError(f"timestamps must hold one time for each of the {len(frames)} frames, got {len(timestamps)}")
    default_size = config.resized_size(*frames[0].shape[-2:])
    sizes = {SLOW: slow_size or default_size, FAST: fast_size or default_size}
    grids = [config.grid(*sizes[kind]) for kind in frame_types]

    lengths = [rows * columns for rows, columns in grids]
    patches = torch.empty(sum(lengths), 3, config.patch_size, config.patch_size, dtype=torch.uint8)
    targets = patches.split(lengths)
    for frame, kind, target in zip(frames, frame_types, targets, strict=True):
        # On 8-bit pixels, so that the result is rounded to whole grey levels as in the official processor.
        resized = torch.nn.functional.interpolate(frame[None], sizes[kind], mode="bilinear", antialias=True)[0]
        target.copy_(config.patchify(resized))

    runs = [(len(list(run)), *grid) for grid, run in groupby(grids)]
    tokens = [length // config.merge_size**2 for length in lengths]
    return PackedVideo(patches, runs, tokens, frame_prompts(frame_types, timestamps))


def frame_prompts(frame_types: Sequence[int], timestamps: Sequence[float] | None) -> str:
    """Per frame: marker, time in seconds with one decimal, and a placeholder, wrapped for fast frames."""
    pieces = []
    for index, kind in enumerate(frame_types):
        time = "" if timestamps is None else format(float(timestamps[index]), ".1f")
        pieces.append(FRAME + time + (FAST_START + VIDEO_PAD + FAST_END if kind == FAST else VIDEO_PAD))
    return "".join(pieces)
