"""Sizes of Keye's real use by name, and small ones that run in a blink. Grids are (frames, rows, columns) of patches."""

import torch

Grid = tuple[int, int, int]

MIXED = [(1, 24, 24), (1, 18, 14), (1, 14, 8), (1, 14, 6)] * 4  # 16 pictures, 84 to 576 patches
PICTURES: dict[str, list[Grid]] = {
    "1_image_1024": [(1, 32, 32)],
    "16_images_mixed": MIXED,
    "64_frames_448": [(64, 16, 28)],
    "video_768_frames_slow_fast": [(1, 16, 28), (5, 8, 14)] * 128,
}
SMALL_PICTURES: dict[str, list[Grid]] = {"1_image_64": [(1, 8, 8)], "4_images_mixed": [(1, 6, 4), (1, 2, 8), (2, 4, 4)]}

# Rows, and new tokens of each
TEXT: dict[str, tuple[int, int]] = {"1k": (1, 1024), "8k": (1, 8192), "batch_8_1k": (8, 1024)}
SMALL_TEXT: dict[str, tuple[int, int]] = {"32": (1, 32), "batch_2_16": (2, 16)}


def num_patches(grids: list[Grid]) -> int:
    return sum(t * h * w for t, h, w in grids)


def text_positions(tokens: int) -> torch.Tensor:
    """[3, T]: half of them text, then one picture of half as many, on three axes that differ."""
    text = torch.arange(tokens - tokens // 2).expand(3, -1)
    side = max(1, int((tokens // 2) ** 0.5))
    at = torch.arange(tokens // 2)
    picture = torch.stack((torch.zeros_like(at), at // side, at % side)) + text.shape[1]
    return torch.cat((text, picture), dim=1)
