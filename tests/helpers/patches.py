"""Patches and their normalization in plain torch, for comparison with those of the processor."""

from __future__ import annotations

import torch

from keye_kernels.pixel_norm import PixelNorm


def cut_patches(frame: torch.Tensor, side: int = 14) -> torch.Tensor:
    """A resized image [3, H, W] as patches [h * w, 3, side, side], row by row."""
    rows, columns = frame.shape[1] // side, frame.shape[2] // side
    blocks = frame.reshape(3, rows, side, columns, side)
    return blocks.permute(1, 3, 0, 2, 4).reshape(rows * columns, 3, side, side)


def normalize(patches: torch.Tensor, norm: PixelNorm) -> torch.Tensor:
    """uint8 patches [P, 3, 14, 14] as float32, with one rounding for each of the three steps."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in norm[:2])
    return patches.float().mul_(norm.rescale_factor).sub_(mean).div_(std)
