"""Named problem sizes: those of real Keye use, and small ones for a test run. A grid is (frames, rows, columns) of patches."""

from typing import NamedTuple

import torch

Grid = tuple[int, int, int]

MIXED_GRIDS: list[Grid] = [(1, 24, 24), (1, 18, 14), (1, 14, 8), (1, 14, 6)] * 4  # 16 images of 84 to 576 patches
IMAGE_GRIDS: dict[str, list[Grid]] = {
    "1_image_1024": [(1, 32, 32)],
    "16_images_mixed": MIXED_GRIDS,
    "64_frames_448": [(64, 16, 28)],
    "video_768_frames_slow_fast": [(1, 16, 28), (5, 8, 14)] * 128,
}
SMALL_IMAGE_GRIDS: dict[str, list[Grid]] = {
    "1_image_64": [(1, 8, 8)],
    "4_images_mixed": [(1, 6, 4), (1, 2, 8), (2, 4, 4)],
    "2_frames_16": [(2, 4, 4)],
}


class Photos(NamedTuple):
    """JPEG files of one size in pixels, and the area to which the processor resizes them."""

    count: int
    height: int
    width: int
    max_pixels: int


PHOTOS = {f"{count}_jpeg_1344x1008": Photos(count, 1008, 1344, 448 * 448) for count in (1, 16)}
SMALL_PHOTOS = {f"{count}_jpeg_120x90": Photos(count, 90, 120, 84 * 84) for count in (1, 3)}

# (batch size, prompt tokens)
PROMPTS: dict[str, tuple[int, int]] = {"1k": (1, 1024), "8k": (1, 8192)}
SMALL_PROMPTS: dict[str, tuple[int, int]] = {"32": (1, 32), "batch_2_16": (2, 16)}


def num_patches(grids: list[Grid]) -> int:
    return sum(t * h * w for t, h, w in grids)


def text_positions(tokens: int) -> torch.Tensor:
    """Position ids [3, T] of T/2 text tokens, followed by one image of T/2 tokens, for which the three axes differ."""
    text = torch.arange(tokens - tokens // 2).expand(3, -1)
    side = max(1, int((tokens // 2) ** 0.5))
    index = torch.arange(tokens // 2)
    image = torch.stack((torch.zeros_like(index), index // side, index % side)) + text.shape[1]
    return torch.cat((text, image), dim=1)
