"""Classifies the frames of a Keye-VL-1.5 video: a frame similar to the last slow frame is fast, any other frame is slow.

Same results as `keye_vl_utils` 1.5.2, without OpenCV; see docs/models/keye_vl_1_5.md, "Slow and fast frames".
Symbols: H and W height and width, multiples of 28; P blocks of 28 x 28 pixels.
"""

from __future__ import annotations

import torch

from keye_kernels.editions import PIXELS_PER_TOKEN, TOKEN_SIDE_PIXELS

from .resize import smart_resize
from .sampling import FRAME_PIXEL_LIMITS, MIN_FRAME_SIMILARITY

SLOW, FAST = 0, 1

# Two blocks are similar above this cosine similarity.
MIN_COSINE = 0.7
# A block with a smaller norm is black.
MAX_BLACK_NORM = 0.01
NORM_EPS = 1e-8
MAX_SIMILARITY_PIXELS = 256 * PIXELS_PER_TOKEN
# Fractional bits of the fixed-point reciprocals in OpenCV's 8-bit HSV conversion.
HSV_SHIFT = 12


class SlowFastClassifier:
    """Classifies the frames of one video, called with one frame after the other. Keeps only the last slow frame.

    A frame with a similarity to the last slow frame below `threshold` is slow.
    """

    def __init__(self, height: int, width: int, threshold: float | None = None) -> None:
        self.size = smart_resize(height, width, min_pixels=FRAME_PIXEL_LIMITS[0], max_pixels=MAX_SIMILARITY_PIXELS)
        self.threshold = MIN_FRAME_SIMILARITY if threshold is None else threshold
        self._last_slow: torch.Tensor | None = None

    def __call__(self, frame: torch.Tensor) -> int:
        """Returns SLOW or FAST for the next frame, uint8 `[3, H, W]`."""
        small = torch.nn.functional.interpolate(frame[None], self.size, mode="bilinear", antialias=True)[0]
        blocks = hsv_blocks(small)
        # The similarity of two black frames is NaN; they count as similar.
        if self._last_slow is not None and not block_similarity(self._last_slow, blocks) < self.threshold:
            return FAST
        self._last_slow = blocks
        return SLOW


def hsv_blocks(frame: torch.Tensor) -> torch.Tensor:
    """Converts an RGB frame uint8 `[3, H, W]` to HSV blocks, float32 `[P, 3 * 28 * 28]`."""
    side = TOKEN_SIDE_PIXELS
    rows, columns = frame.shape[1] // side, frame.shape[2] // side
    blocks = rgb_to_hsv(frame).view(3, rows, side, columns, side)
    return blocks.permute(1, 3, 0, 2, 4).reshape(rows * columns, -1).float()


def block_similarity(a: torch.Tensor, b: torch.Tensor) -> float:
    """Computes the fraction of blocks `[P, C]` of two frames with a cosine similarity above 0.7, rounded to float32.

    Blocks that are black in both frames are not counted; NaN if all blocks are black.
    """
    norm_a, norm_b = a.norm(dim=1) + NORM_EPS, b.norm(dim=1) + NORM_EPS
    cosine = torch.linalg.vecdot(a, b) / (norm_a * norm_b)
    is_counted = (norm_a >= MAX_BLACK_NORM) | (norm_b >= MAX_BLACK_NORM)
    return (cosine[is_counted] > MIN_COSINE).float().mean().item()


def rgb_to_hsv(frame: torch.Tensor) -> torch.Tensor:
    """Converts an RGB frame uint8 `[3, H, W]` to 8-bit HSV, bitwise equal to OpenCV's `COLOR_RGB2HSV` (hue 0 to 179)."""
    red, green, blue = frame.contiguous().to(torch.int16)
    value = torch.maximum(torch.maximum(red, green), blue)
    spread = value - torch.minimum(torch.minimum(red, green), blue)
    # Sums of masked terms: torch.where is several times slower.
    is_red = (value == red).to(torch.int16)
    is_green = (value == green).to(torch.int16) * (1 - is_red)
    hue = is_red * (green - blue) + is_green * (blue - red + 2 * spread)
    hue += (1 - is_red - is_green) * (red - green + 4 * spread)
    hue = _scaled_ratio(30, hue, spread)
    # The arithmetic shift gives a mask of ones for negative hues, which wrap around by 180.
    hue += (hue >> 31) & 180
    hsv = torch.empty_like(frame, memory_format=torch.contiguous_format)
    hsv[0], hsv[1], hsv[2] = hue, _scaled_ratio(255, spread, value), value
    return hsv


def _scaled_ratio(scale: int, numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """Computes `scale * numerator / denominator` in int32 with OpenCV's fixed-point rounding; 0 for 0 / 0."""
    # float32 is exact enough: a quotient of these integers is never within its rounding error of a half.
    reciprocal = ((scale << HSV_SHIFT) / denominator.clamp(min=1)).round_().to(torch.int32)
    return reciprocal.mul_(numerator).add_(1 << (HSV_SHIFT - 1)) >> HSV_SHIFT
