"""The image processor: images and videos to 14 x 14 patches, 8-bit or normalized, in threads.

Symbols: P patches, T frames, h and w rows and columns of patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from keye_kernels.editions import PREVIEW, EditionName, edition_named
from keye_kernels.pixel_norm import PixelNorm

from .images import decode_repeated, load_image
from .pixels import is_pixels, to_uint8
from .resize import smart_resize_processor
from .threads import map_in_threads

if TYPE_CHECKING:
    from PIL.Image import Image

Frame = TypeVar("Frame")
Grid = tuple[int, int, int]

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

    def images_to_patches(
        self, images: Sequence[Any], edition: EditionName, pixel_dtype: str = "uint8"
    ) -> tuple[torch.Tensor, list[Grid]]:
        """Loads images (anything that `load_image` takes), resizes them and splits them into patches.

        Returns `(patches, grids)` as `videos_to_patches`, with the grid (1, h, w) of each image.
        """

        def read(source: Any) -> np.ndarray:
            image = load_image(source, edition=edition)
            return self._resize(image, self.resized_size(image.height, image.width))

        decode_repeated(images)
        resized = map_in_threads(read, images)
        grids = [(1, *self.grid(*pixels.shape[:2])) for pixels in resized]
        return self.pack(resized, [math.prod(grid) for grid in grids], lambda pixels: pixels, pixel_dtype), grids

    def videos_to_patches(
        self, videos: Sequence[Any], edition: EditionName, pixel_dtype: str = "uint8"
    ) -> tuple[torch.Tensor, list[Grid]]:
        """Resizes Preview videos (anything that `to_frame_tensors` takes) and splits them into patches.

        The first frame of a video determines the size of all. Returns `(patches, grids)` with patches `[P, 3, 14, 14]` of
        `pixel_dtype`, frame by frame and row by row, and the grid (T, h, w) of each video.
        """
        from PIL import Image

        frames: list[tuple[torch.Tensor, tuple[int, int]]] = []
        lengths: list[int] = []
        grids: list[Grid] = []
        for video in videos:
            tensors = to_frame_tensors(video, edition)
            size = self.resized_size(*tensors[0].shape[-2:])
            frames += [(frame, size) for frame in tensors]
            rows, columns = self.grid(*size)
            lengths += [rows * columns] * len(tensors)
            grids.append((len(tensors), rows, columns))

        def read(frame: tuple[torch.Tensor, tuple[int, int]]) -> np.ndarray:
            pixels, size = frame
            return self._resize(Image.fromarray(to_frame_array(pixels)), size)

        return self.pack(frames, lengths, read, pixel_dtype), grids

    def pack(
        self, frames: Sequence[Frame], lengths: Sequence[int], read: Callable[[Frame], np.ndarray], pixel_dtype: str
    ) -> torch.Tensor:
        """The patches `[P, 3, 14, 14]` of all frames, in order, in one tensor.

        `read` returns a resized frame, uint8 `[H, W, 3]`, and runs in threads. `lengths` are the patches of each frame.
        """
        # numpy: in a helper thread, torch would start threads of its own, and it cannot write to tensors of inference mode
        patches = np.empty((sum(lengths), 3, self.patch_size, self.patch_size), check_pixel_dtype(pixel_dtype))
        targets = np.split(patches, np.cumsum(lengths)[:-1])
        map_in_threads(lambda job: self._cut(read(job[0]), job[1]), zip(frames, targets, strict=True))
        return torch.from_numpy(patches)

    def _resize(self, image: Image, size: tuple[int, int]) -> np.ndarray:
        height, width = size
        return np.asarray(image if image.size == (width, height) else image.resize((width, height), resample=self.resample))

    def _cut(self, pixels: np.ndarray, patches: np.ndarray) -> None:
        """Writes the patches of a resized frame, uint8 `[H, W, 3]`, row by row to `patches`, uint8 or normalized float32."""
        side = self.patch_size
        rows, columns = self.grid(*pixels.shape[:2])
        source = pixels.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3)
        target = patches.reshape(rows, columns, 3, side, side)
        if patches.dtype == np.uint8:
            target[...] = source
            return
        factor = np.float32(self.norm.rescale_factor)
        mean, std = (np.array(values, np.float32).repeat(side**2).reshape(3, side, side) for values in self.norm[:2])
        # One row of patches at a time, which stays in the cache
        for target_row, source_row in zip(target, source, strict=True):
            target_row[...] = source_row
            target_row *= factor
            target_row -= mean
            target_row /= std


def check_pixel_dtype(pixel_dtype: Any) -> str:
    """Returns the name of the dtype. Raises ValueError for dtypes that the processor does not make."""
    name = str(pixel_dtype).removeprefix("torch.")
    if name not in ("float32", "uint8"):
        raise ValueError(f"pixel_dtype must be 'float32' or 'uint8', got {pixel_dtype!r}")
    return name


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
    if isinstance(video, torch.Tensor):
        frames = [_to_frame_tensor(frame, edition) for frame in video]
    else:
        decode_repeated(video)
        frames = map_in_threads(lambda frame: _to_frame_tensor(frame, edition), video)
    if not frames:
        raise ValueError("a video must have at least one frame, got none")
    return frames


def to_frame_array(frame: torch.Tensor) -> np.ndarray:
    """Converts a frame `[3, H, W]` to an array `[H, W, 3]`."""
    return np.ascontiguousarray(frame.numpy().transpose(1, 2, 0))


def _to_frame_tensor(frame: Any, edition: EditionName) -> torch.Tensor:
    if isinstance(frame, torch.Tensor):
        frame = to_uint8(frame, "an image tensor", is_frame=True)
        if frame.ndim == 3 and frame.shape[0] == 3:
            return frame
    return torch.from_numpy(np.array(load_image(frame, edition=edition))).permute(2, 0, 1)
