"""Converts arrays and tensors of pixels to uint8 with channels last."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

CHANNELS = (1, 3, 4)  # gray, RGB, RGBA


def is_pixels(image: Any) -> bool:
    """Whether an image is an array or a tensor."""
    return isinstance(image, (np.ndarray, torch.Tensor))


def to_channels_last(image: np.ndarray | torch.Tensor) -> np.ndarray:
    """Converts gray `[H, W]` or 1, 3 or 4 channels, first or last, to uint8 `[H, W]`, `[H, W, 3]` or `[H, W, 4]`.

    If both the first and the last axis could be the channels, they are the last ones of an array and the first ones of a tensor.
    Raises TypeError for another dtype, ValueError for other shapes or values.
    """
    is_tensor = isinstance(image, torch.Tensor)
    if isinstance(image, torch.Tensor):
        image = to_uint8(image, "an image tensor").numpy()
    if image.dtype != np.uint8:
        raise TypeError(f"a numpy image must be uint8, got {image.dtype}")
    shape = image.shape
    axes = [axis for axis in ((0, -1) if is_tensor else (-1, 0)) if len(shape) == 3 and shape[axis] in CHANNELS]
    if 0 in shape or not (len(shape) == 2 or axes):
        raise ValueError(
            f"an image must have shape [H, W], or [H, W, C] or [C, H, W] with 1 (gray), 3 (RGB) or 4 (RGBA) channels, "
            f"got {list(shape)}"
        )
    if axes:
        image = np.moveaxis(image, axes[0], -1)
    return np.ascontiguousarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image)


def to_uint8(pixels: torch.Tensor, name: str, is_frame: bool = False) -> torch.Tensor:
    """Converts pixels to uint8 on the CPU; floating-point values must be from 0 to 255 and are rounded.

    `is_frame`: accepts floating-point values that are only 0 and 1, as in the first frames of a video that starts black.
    """
    pixels = pixels.detach().cpu()
    if pixels.dtype == torch.uint8:
        return pixels
    if pixels.dtype == torch.bool or pixels.is_complex():
        raise TypeError(f"{name} must hold integers or floating-point numbers from 0 to 255, got {pixels.dtype}")
    if not pixels.is_floating_point():
        pixels = pixels.long()
    if pixels.numel() and not bool(((pixels >= 0) & (pixels <= 255)).all()):
        raise ValueError(f"{name} must hold values from 0 to 255, got {pixels.min().item()} to {pixels.max().item()}")
    if pixels.is_floating_point():
        is_integer = bool((pixels == pixels.round()).all())
        if pixels.numel() and 0 < pixels.max() <= 1 and not (is_frame and is_integer):
            raise ValueError(f"{name} must hold values from 0 to 255, got values from 0 to 1; multiply them by 255")
        pixels = pixels.round()
    return pixels.to(torch.uint8)
