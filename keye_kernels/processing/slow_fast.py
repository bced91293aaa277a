"""Slow and fast frames of Keye-VL-1.5: a frame that looks like the last slow one is fast, any other is slow.

Source: ``keye_vl_utils`` 1.5.2, without OpenCV. Symbols: H and W height and width, multiples of 28; P patches of 28 x 28.
"""

from __future__ import annotations

import torch

from .resize import FACTOR, smart_resize
from .sampling import FRAME_PIXEL_LIMITS, MIN_FRAME_SIMILARITY

SLOW, FAST = 0, 1

# Two patches look alike above this cosine.
MIN_COSINE = 0.7
DARK_NORM = 0.01
NORM_EPS = 1e-8
MAX_SIMILARITY_PIXELS = 256 * FACTOR * FACTOR
# Fractional bits of the reciprocals that OpenCV divides with in 8-bit HSV.
HSV_SHIFT = 12


class SlowFastClassifier:
    """Types of a video's frames, one after the other; keeps only the last slow frame's patches.

    Args:
        height, width: size of the frames.
        threshold: a frame less similar than this to the last slow frame is slow.
    """

    def __init__(self, height: int, width: int, threshold: float = MIN_FRAME_SIMILARITY) -> None:
        self.size = smart_resize(height, width, min_pixels=FRAME_PIXEL_LIMITS[0], max_pixels=MAX_SIMILARITY_PIXELS)
        self.threshold = threshold
        self._key: torch.Tensor | None = None

    def __call__(self, frame: torch.Tensor) -> int:
        """SLOW or FAST for the next frame, uint8 ``[3, H, W]``."""
        small = torch.nn.functional.interpolate(frame[None], self.size, mode="bilinear", antialias=True)[0]
        patches = hsv_patches(small)
        # An all-black video has no similarity (NaN), and counts as unchanged.
        if self._key is not None and not patch_similarity(self._key, patches) < self.threshold:
            return FAST
        self._key = patches
        return SLOW


def hsv_patches(frame: torch.Tensor) -> torch.Tensor:
    """HSV values of an RGB frame uint8 ``[3, H, W]``, as float32 ``[P, 3 * 28 * 28]``."""
    rows, columns = frame.shape[1] // FACTOR, frame.shape[2] // FACTOR
    blocks = rgb_to_hsv(frame).view(3, rows, FACTOR, columns, FACTOR)
    return blocks.permute(1, 3, 0, 2, 4).reshape(rows * columns, -1).float()


def patch_similarity(a: torch.Tensor, b: torch.Tensor) -> float:
    """Share of the patches of two frames whose cosine exceeds 0.7; patches that are black in both do not count.

    Args:
        a, b: float32 ``[P, C]`` from :func:`hsv_patches`.

    Returns:
        0 to 1 in float32's rounding, or NaN if every patch is black.
    """
    norm_a, norm_b = a.norm(dim=1) + NORM_EPS, b.norm(dim=1) + NORM_EPS
    cosine = torch.linalg.vecdot(a, b) / (norm_a * norm_b)
    lit = (norm_a >= DARK_NORM) | (norm_b >= DARK_NORM)
    return (cosine[lit] > MIN_COSINE).float().mean().item()


def rgb_to_hsv(frame: torch.Tensor) -> torch.Tensor:
    """8-bit HSV of an RGB frame, bit for bit as OpenCV's ``COLOR_RGB2HSV``.

    Args:
        frame: uint8 ``[3, H, W]``.

    Returns:
        uint8 ``[3, H, W]``: hue 0 to 179, saturation and value 0 to 255.
    """
    red, green, blue = frame.contiguous().to(torch.int16)
    value = torch.maximum(torch.maximum(red, green), blue)
    spread = value - torch.minimum(torch.minimum(red, green), blue)
    # Sums of masked terms: torch.where takes several times as long.
    is_red = (value == red).to(torch.int16)
    is_green = (value == green).to(torch.int16) * (1 - is_red)
    hue = is_red * (green - blue) + is_green * (blue - red + 2 * spread)
    hue += (1 - is_red - is_green) * (red - green + 4 * spread)
    hue = _scaled_ratio(30, hue, spread)
    # The sign bit spread over the word selects what is to wrap around.
    hue += (hue >> 31) & 180
    hsv = torch.empty_like(frame, memory_format=torch.contiguous_format)
    hsv[0], hsv[1], hsv[2] = hue, _scaled_ratio(255, spread, value), value
    return hsv


def _scaled_ratio(scale: int, numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """``scale * numerator / denominator``, int32 with OpenCV's rounding by fixed-point reciprocals; 0 for 0 / 0."""
    # float32 is enough: a quotient of integers is never as close to a half as its rounding error.
    reciprocal = ((scale << HSV_SHIFT) / denominator.clamp(min=1)).round_().to(torch.int32)
    return reciprocal.mul_(numerator).add_(1 << (HSV_SHIFT - 1)) >> HSV_SHIFT
