"""From JPEG files in memory to patches, and to the output of the projector, as benchmark cases."""

import io
from collections.abc import Sequence
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from keye_kernels.model import Keye
from keye_kernels.processing.batch import BatchFeature
from keye_kernels.processing.patches import PatchConfig

from . import stages
from .measuring import RequiredWork
from .models import transformers_model
from .peers import ONE_BY_ONE, ONE_THREAD, TRANSFORMERS
from .shapes import Grid, Photos

JPEG_QUALITY = 90
NOISE_LEVELS = 12  # of the 256 gray levels, so that the files are as large as those of photos


@lru_cache(maxsize=4)
def jpegs(photos: Photos) -> tuple[bytes, ...]:
    """Files of smooth colors with noise, which take about 2.8 bits per pixel."""
    from PIL import Image

    files = []
    for seed in range(photos.count):
        random = np.random.default_rng(seed)
        colors = random.integers(0, 256, (photos.height // 16 + 1, photos.width // 16 + 1, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(colors).resize((photos.width, photos.height))).astype(np.int16)
        noisy = smooth + random.integers(-NOISE_LEVELS, NOISE_LEVELS + 1, smooth.shape)
        file = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=JPEG_QUALITY)
        files.append(file.getvalue())
    return tuple(files)


def one_by_one(files: Sequence[bytes], config: PatchConfig) -> tuple[Tensor, list[Grid]]:
    """Pillow and numpy, one image after the other, normalized before it is cut: the steps of the official image processor."""
    from PIL import Image

    patches, grids, side = [], [], config.patch_size
    mean, std = (np.array(values, np.float32) for values in config.norm[:2])
    for file in files:
        image = Image.open(io.BytesIO(file)).convert("RGB")
        height, width = config.resized_size(image.height, image.width)
        pixels = np.array(image.resize((width, height), resample=config.resample))
        pixels = (pixels.astype(np.float32) * np.float32(config.norm.rescale_factor) - mean) / std
        rows, columns = config.grid(height, width)
        blocks = pixels.transpose(2, 0, 1).reshape(3, rows, side, columns, side).transpose(1, 3, 0, 2, 4)
        patches.append(blocks.reshape(rows * columns, 3, side, side))
        grids.append((1, rows, columns))
    return torch.from_numpy(np.concatenate(patches)), grids


def preprocessing(photos: Photos) -> stages.BenchmarkCase:
    """JPEG files to normalized patches [T, 3, 14, 14] on the CPU."""
    files, config = jpegs(photos), PatchConfig(max_pixels=photos.max_pixels)

    def one_thread() -> Tensor:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return in_threads()
        finally:
            torch.set_num_threads(threads)

    def in_threads() -> Tensor:
        return config.images_to_patches(files, "preview", "float32")[0]

    make = {
        ONE_BY_ONE: lambda: lambda: one_by_one(files, config)[0],
        ONE_THREAD: lambda: one_thread,
        stages.KEYE_KERNELS: lambda: in_threads,
    }
    patches = in_threads()
    return stages.BenchmarkCase(RequiredWork(len(patches), sum(map(len, files)) + patches.nbytes, 0), make)


def images(model: Keye, photos: Photos) -> stages.BenchmarkCase:
    """JPEG files to the output of the projector [T/4, hidden].

    The peer preprocesses one image after the other, and copies float32 patches from pageable memory; here images are read in
    threads, and uint8 patches are copied from pinned memory.
    """
    files, config = jpegs(photos), PatchConfig(max_pixels=photos.max_pixels)

    def encode(call: torch.nn.Module | Keye) -> Tensor:
        patches, grids = one_by_one(files, config)
        return call.get_image_features(patches.to(model.device).to(model.dtype), torch.tensor(grids))

    def keye_kernels() -> Tensor:
        patches, grids = config.images_to_patches(files, "preview", "uint8")
        inputs = BatchFeature(pixel_values=patches, image_grid_thw=torch.tensor(grids)).to(model.device)
        return model.get_image_features(inputs.pixel_values, inputs.image_grid_thw)

    make = {
        TRANSFORMERS: lambda: partial(encode, transformers_model(model)),
        ONE_BY_ONE: lambda: partial(encode, model),
        stages.KEYE_KERNELS: lambda: keye_kernels,
    }
    _, grids = one_by_one(files, config)
    work = stages.vision(model, grids).work
    return stages.BenchmarkCase(RequiredWork(work.tokens, work.bytes + sum(map(len, files)), work.flops), make)
