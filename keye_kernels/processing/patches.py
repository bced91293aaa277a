"""The image processor's arithmetic: 8-bit images to 14 x 14 patches, and their normalization.

Symbols: P patches, T frames, h and w rows and columns of patches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from keye_kernels.editions import PREVIEW, EditionName, edition_named
from keye_kernels.pixel_norm import PixelNorm

from .images import load_image
from .pixels import is_pixels, to_uint8
from .resize import smart_resize_processor

# Steps that preprocessor_config.json can turn off; the model was trained with all of them.
STEPS = ("do_resize", "do_rescale", "do_normalize")
# The largest number of a Pillow resize filter, Image.Resampling.HAMMING
MAX_RESAMPLE = 5
# As for the vision tower in config.json
MAX_PATCH_SIZE, MAX_MERGE_SIZE = 256, 16


@dataclass(frozen=True)
class PatchConfig:
    """The settings of the image processor, read from `preprocessor_config.json`."""

    # Smallest and largest area of a resized image, in pixels
    min_pixels: int = 3136
    max_pixels: int = 1003520
    patch_size: int = 14  # pixels
    # The language model gets one token per merge_size x merge_size patches.
    merge_size: int = 2
    norm: PixelNorm = field(default_factory=PixelNorm)
    # Pillow's number of the resize filter
    resample: int = PREVIEW.resample

    def __post_init__(self) -> None:
        for name in ("min_pixels", "max_pixels", "patch_size", "merge_size", "resample"):
            value, lowest = getattr(self, name), 0 if name == "resample" else 1
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value % 1 or value < lowest:
                where = "of the image processor (preprocessor_config.json)"
                raise ValueError(f"{name} {where} must be an integer of at least {lowest}, got {value!r}")
            object.__setattr__(self, name, int(value))
        for name, highest in (("patch_size", MAX_PATCH_SIZE), ("merge_size", MAX_MERGE_SIZE), ("resample", MAX_RESAMPLE)):
            if (value := getattr(self, name)) > highest:
                lowest = 0 if name == "resample" else 1
                raise ValueError(f"{name} in preprocessor_config.json must be from {lowest} to {highest}, got {value:g}")
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels={self.min_pixels} of the image processor must not exceed max_pixels={self.max_pixels}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], edition: EditionName) -> PatchConfig:
        """Reads the content of `preprocessor_config.json`; missing entries keep their defaults.

        Raises ValueError for a value that the model does not support, such as a temporal patch size other than 1.
        """
        if config.get("temporal_patch_size", 1) != 1:
            raise ValueError(f"temporal_patch_size in preprocessor_config.json must be 1, got {config['temporal_patch_size']}")
        for name in STEPS:
            if config.get(name) not in (None, True):
                raise ValueError(
                    f"{name} in preprocessor_config.json must be true, got {config[name]!r}: the model needs this step"
                )
        size = config.get("size") or {}
        if not isinstance(size, Mapping):
            raise ValueError(f"size in preprocessor_config.json must be an object with min_pixels and max_pixels, got {size!r}")
        values = {name: config.get(name) for name in ("patch_size", "merge_size", "resample")}
        for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            limits = (config.get(name), size.get(name), size.get(edge))
            values[name] = next((limit for limit in limits if limit is not None), None)
        given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        return replace(cls(norm=PixelNorm.from_dict(config), resample=edition_named(edition).resample), **given)

    @property
    def factor(self) -> int:
        """Sides of resized images are multiples of this number of pixels."""
        return self.patch_size * self.merge_size

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """Computes `(height, width)` to which the image processor resizes an image of this size."""
        return smart_resize_processor(height, width, min_pixels=self.min_pixels, max_pixels=self.max_pixels, factor=self.factor)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Computes `(h, w)`, rows and columns of patches, of a resized image."""
        if height <= 0 or width <= 0 or height % self.factor or width % self.factor:
            raise ValueError(f"height and width of resized frames must be multiples of {self.factor}, got {height}x{width}")
        return height // self.patch_size, width // self.patch_size

    def patchify(self, frame: torch.Tensor) -> torch.Tensor:
        """Splits a resized image, uint8 `[3, H, W]`, into patches, uint8 `[h * w, 3, 14, 14]`, row by row."""
        rows, columns = self.grid(*frame.shape[-2:])
        blocks = frame.reshape(3, rows, self.patch_size, columns, self.patch_size)
        return blocks.permute(1, 3, 0, 2, 4).reshape(rows * columns, 3, self.patch_size, self.patch_size)

    def normalize(self, patches: torch.Tensor) -> torch.Tensor:
        """Applies `norm` to patches, uint8 `[P, 3, 14, 14]`; returns float32."""
        mean = torch.tensor(self.norm.image_mean).view(3, 1, 1)
        std = torch.tensor(self.norm.image_std).view(3, 1, 1)
        return patches.float().mul_(self.norm.rescale_factor).sub_(mean).div_(std)

    def concatenate_as(self, pixel_dtype: str) -> Callable[[list[torch.Tensor]], torch.Tensor]:
        """Returns the function that concatenates uint8 patches and converts them to `pixel_dtype`."""
        name = str(pixel_dtype).removeprefix("torch.")
        if name not in ("float32", "uint8"):
            raise ValueError(f"pixel_dtype must be 'float32' or 'uint8', got {pixel_dtype!r}")
        if name == "uint8":
            return torch.cat
        return lambda patches: self.normalize(torch.cat(patches))

    def frames_to_patches(self, frames: Sequence[np.ndarray]) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """Resizes one image, or the T frames of one Preview video, and splits them into patches.

        Takes uint8 RGB arrays `[H, W, 3]`; the first one determines the size of all. Returns `(patches, (T, h, w))` with patches
        uint8 `[T * h * w, 3, 14, 14]`, frame by frame and row by row.
        """
        from PIL import Image

        height, width = self.resized_size(*frames[0].shape[:2])
        rows, columns = self.grid(height, width)
        patches = torch.empty(len(frames) * rows * columns, 3, self.patch_size, self.patch_size, dtype=torch.uint8)
        for frame, target in zip(frames, patches.split(rows * columns), strict=True):
            resized = Image.fromarray(frame).resize((width, height), resample=self.resample)
            target.copy_(self.patchify(torch.from_numpy(np.array(resized)).permute(2, 0, 1)))
        return patches, (len(frames), rows, columns)


def to_frame_array(image: Any, edition: EditionName) -> np.ndarray:
    """Converts anything that `load_image` takes to a uint8 RGB array `[H, W, 3]`."""
    return np.asarray(load_image(image, edition=edition))


def to_frame_tensors(video: Any, edition: EditionName) -> list[torch.Tensor]:
    """Converts one video to a list of frames, each uint8 `[3, H, W]`.

    Takes an array or tensor of 4 axes (frames, then those of an image), or a list of images, which may differ in size. Tensors
    may have floating-point values from 0 to 255. Raises ValueError for wrong shapes, values or no frames, or TypeError.
    """
    if is_pixels(video) and video.ndim != 4:
        raise ValueError(f"a video must have shape [T, 3, H, W] or [T, H, W, 3], got {list(video.shape)}")
    if isinstance(video, torch.Tensor):
        video = to_uint8(video, "a video tensor")
    elif not isinstance(video, (list, tuple, np.ndarray)):
        raise TypeError(
            "a video must be a tensor [T, 3, H, W], a uint8 array [T, H, W, 3] or a list of images, "
            f"got {type(video).__name__}; read files with process_vision_info first"
        )
    frames = [_to_frame_tensor(frame, edition) for frame in video]
    if not frames:
        raise ValueError("a video must have at least one frame, got none")
    return frames


def to_frame_arrays(video: Any, edition: EditionName) -> list[np.ndarray]:
    """The frames of `to_frame_tensors` as arrays `[H, W, 3]`."""
    return [frame.permute(1, 2, 0).contiguous().numpy() for frame in to_frame_tensors(video, edition)]


def _to_frame_tensor(frame: Any, edition: EditionName) -> torch.Tensor:
    if isinstance(frame, torch.Tensor):
        frame = to_uint8(frame, "an image tensor", is_frame=True)
        if frame.ndim == 3 and frame.shape[0] == 3:
            return frame
    return torch.from_numpy(np.array(load_image(frame, edition=edition))).permute(2, 0, 1)
