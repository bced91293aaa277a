"""Pictures to patches: the image processor's arithmetic, from 8-bit pixels to 14 x 14 patches and their normalisation.

Symbols: P patches, T frames, h and w rows and columns of patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .images import Edition, load_image
from .resize import smart_resize_processor

BILINEAR, BICUBIC = 2, 3  # Pillow's numbers, which preprocessor_config.json uses
DEFAULT_RESAMPLE = {"preview": BICUBIC, "1.5": BILINEAR}


@dataclass(frozen=True)
class PatchConfig:
    """What ``preprocessor_config.json`` says about pictures."""

    min_pixels: int = 3136
    max_pixels: int = 1003520
    patch_size: int = 14
    merge_size: int = 2
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    resample: int = BICUBIC

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], edition: Edition) -> PatchConfig:
        """Reads a preprocessor configuration.

        Raises:
            ValueError: a value that the model cannot take, such as a temporal patch size other than 1.
        """
        if config.get("temporal_patch_size", 1) != 1:
            raise ValueError(
                f"temporal_patch_size in preprocessor_config.json must be 1, got {config['temporal_patch_size']}"
            )
        size = config.get("size") or {}
        limits = {
            "min_pixels": config.get("min_pixels") or size.get("min_pixels") or size.get("shortest_edge"),
            "max_pixels": config.get("max_pixels") or size.get("max_pixels") or size.get("longest_edge"),
        }
        values = {name: int(value) for name, value in limits.items() if value is not None}
        values["resample"] = DEFAULT_RESAMPLE[edition]
        for name in ("patch_size", "merge_size", "rescale_factor", "resample"):
            if config.get(name) is not None:
                values[name] = config[name]
        for name in ("image_mean", "image_std"):
            if config.get(name) is not None:
                if len(config[name]) != 3:
                    raise ValueError(f"{name} in preprocessor_config.json must hold 3 numbers, got {config[name]}")
                values[name] = tuple(float(number) for number in config[name])
        return cls(**values)

    @property
    def factor(self) -> int:
        """Sides of resized pictures are multiples of this many pixels."""
        return self.patch_size * self.merge_size

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """``(height, width)`` the image processor gives a picture."""
        return smart_resize_processor(
            height, width, min_pixels=self.min_pixels, max_pixels=self.max_pixels, factor=self.factor
        )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """``(h, w)`` in patches of a resized picture."""
        if height <= 0 or width <= 0 or height % self.factor or width % self.factor:
            raise ValueError(
                f"height and width of resized frames must be multiples of {self.factor}, got {height}x{width}"
            )
        return height // self.patch_size, width // self.patch_size

    def patchify(self, frame: torch.Tensor) -> torch.Tensor:
        """Patches, row by row, of one picture whose size is already right.

        Args:
            frame: uint8 ``[3, H, W]``.

        Returns:
            uint8 ``[h * w, 3, patch_size, patch_size]``.
        """
        rows, columns = self.grid(*frame.shape[-2:])
        blocks = frame.reshape(3, rows, self.patch_size, columns, self.patch_size)
        return blocks.permute(1, 3, 0, 2, 4).reshape(rows * columns, 3, self.patch_size, self.patch_size)

    def normalize(self, patches: torch.Tensor) -> torch.Tensor:
        """``(patches * rescale_factor - mean) / std`` of uint8 ``[P, 3, 14, 14]``, float32 of the same shape."""
        mean = torch.tensor(self.image_mean).view(3, 1, 1)
        std = torch.tensor(self.image_std).view(3, 1, 1)
        return patches.float().mul_(self.rescale_factor).sub_(mean).div_(std)

    def frames_to_patches(self, frames: Sequence[np.ndarray]) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """Patches of one picture or of one Preview video; the first frame decides the size of all.

        Args:
            frames: uint8 RGB arrays ``[H, W, 3]``.

        Returns:
            ``(patches, (T, h, w))``: uint8 ``[T * h * w, 3, 14, 14]``, frame by frame and row by row.
        """
        from PIL import Image

        height, width = self.resized_size(*frames[0].shape[:2])
        rows, columns = self.grid(height, width)
        patches = torch.empty(len(frames) * rows * columns, 3, self.patch_size, self.patch_size, dtype=torch.uint8)
        for frame, target in zip(frames, patches.split(rows * columns), strict=True):
            resized = Image.fromarray(frame).resize((width, height), resample=self.resample)
            target.copy_(self.patchify(torch.from_numpy(np.array(resized)).permute(2, 0, 1)))
        return patches, (len(frames), rows, columns)


def to_frame_array(image: Any, edition: Edition) -> np.ndarray:
    """uint8 RGB array ``[H, W, 3]`` of anything :func:`load_image` takes, or of a tensor ``[3, H, W]``."""
    if isinstance(image, torch.Tensor):
        return _check_tensor(image).permute(1, 2, 0).contiguous().numpy()
    return np.asarray(load_image(image, edition=edition))


def to_frame_tensors(video: Any, edition: Edition) -> list[torch.Tensor]:
    """Frames of one video, each uint8 ``[3, H, W]``.

    Args:
        video: tensor ``[T, 3, H, W]`` (uint8, or float holding 0 to 255), uint8 array ``[T, H, W, 3]``, or a list of
            pictures or tensors ``[3, H, W]``, which may differ in size.
        edition: whose rule for transparency applies.

    Raises:
        ValueError, TypeError: another shape or type, no frames, or values outside 0 to 255.
    """
    if isinstance(video, torch.Tensor):
        if video.ndim != 4 or video.shape[1] != 3:
            raise ValueError(f"a video tensor must have shape [T, 3, H, W], got {list(video.shape)}")
        frames = list(to_uint8(video, "a video tensor"))
    elif isinstance(video, np.ndarray) and video.ndim != 4:
        raise ValueError(f"a video array must have shape [T, H, W, 3], got {list(video.shape)}")
    elif isinstance(video, (list, tuple, np.ndarray)):
        frames = [
            _check_tensor(frame)
            if isinstance(frame, torch.Tensor)
            else torch.from_numpy(np.array(load_image(frame, edition=edition))).permute(2, 0, 1)
            for frame in video
        ]
    else:
        raise TypeError(
            "a video must be a tensor [T, 3, H, W], a uint8 array [T, H, W, 3] or a list of pictures, "
            f"got {type(video).__name__}; read files with process_vision_info first"
        )
    if not frames:
        raise ValueError("a video must have at least one frame, got none")
    return frames


def to_uint8(pixels: torch.Tensor, name: str) -> torch.Tensor:
    """The same pixels as uint8 on the CPU; floating values must be in 0 to 255 and are rounded."""
    pixels = pixels.detach().cpu()
    if pixels.dtype == torch.uint8:
        return pixels
    if pixels.numel() and not bool(((pixels >= 0) & (pixels <= 255)).all()):
        raise ValueError(f"{name} must hold values from 0 to 255, got {pixels.min().item()} to {pixels.max().item()}")
    if pixels.is_floating_point():
        if pixels.numel() and pixels.max() <= 1 and bool((pixels != pixels.round()).any()):
            raise ValueError(f"{name} must hold values from 0 to 255, got values from 0 to 1; multiply them by 255")
        pixels = pixels.round()
    return pixels.to(torch.uint8)


def _check_tensor(image: torch.Tensor) -> torch.Tensor:
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"an image tensor must have shape [3, H, W], got {list(image.shape)}")
    return to_uint8(image, "an image tensor")
