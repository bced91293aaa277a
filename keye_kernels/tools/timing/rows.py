"""The rows of `keye-kernels bench --gpu`, the most important first."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from keye_kernels.model import Keye

from . import peers, stages
from .images import images as images_to_projector
from .models import build_model, make_config
from .operators import ATTENTION, SMALL_ATTENTION, attention, ceiling
from .patched import patched_tower
from .shapes import IMAGE_GRIDS, PHOTOS, SMALL_IMAGE_GRIDS, SMALL_PHOTOS, Grid
from .stages import BenchmarkCase

VISION_PEERS = (peers.OFFICIAL, peers.TRANSFORMERS, stages.KEYE_KERNELS, stages.WITHOUT_GRAPHS)
COMPILED = (peers.COMPILED_TOWER,)
ATTENTION_PEERS = (peers.TORCH_FLASH, peers.CUDNN, peers.FLASH_ATTN, peers.FLASH_ATTN_4, "auto")
ATTENTION_ROWS = (
    "1_image_1024",
    "16_images_mixed",
    "16_images_1024",
    "64_frames_448",
    "1_image_5120",
    "1_segment_28672",
    "prompt_1k",
    "8_prompts_1k",
    "prompt_8k",
)
SMALL_NAMES = {"1_image_1024": "1_image_64", "16_images_mixed": "4_images_mixed", "64_frames_448": "2_frames_16"}
CALLS_OF_AN_OPERATOR = 20  # in a row: a layer too launches an operator while the GPU still works for the one before it


@dataclass(frozen=True)
class Row:
    """One workload.

    Attributes:
        group, shape: its name in the result.
        seconds: estimate for all its implementations on an H100 with a slow CPU: compilation, warm-up, rounds and profile.
        case: builds it.
        repeat: calls per round.
        only: the implementations to run, None for all.
    """

    group: str
    shape: str
    seconds: float
    case: Callable[[], BenchmarkCase]
    repeat: int = 1
    only: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        return f"{self.group} {self.shape}"


def all_rows(small: bool, dtype: torch.dtype, device: torch.device) -> list[Row]:
    """All rows, of the sizes of Keye-VL-8B-Preview or, to test the command, small ones."""

    def model() -> Keye:
        return build_model(make_config(small=small), dtype, device)  # cached: all rows share it

    def images(name: str) -> tuple[str, list[Grid]]:
        shape = SMALL_NAMES[name] if small else name
        return shape, (SMALL_IMAGE_GRIDS | IMAGE_GRIDS)[shape]

    def vision(name: str, seconds: float, only: tuple[str, ...] = VISION_PEERS) -> Row:
        shape, grids = images(name)
        return Row("vision", shape, seconds, lambda: stages.vision(model(), grids), only=only)

    def prefill(tokens: int, seconds: float) -> Row:
        tokens = tokens // 64 if small else tokens
        return Row("prefill", f"{tokens}_tokens", seconds, lambda: stages.prefill(model(), 1, tokens))

    def decode(batch_size: int, seconds: float) -> Row:
        cached = 16 if small else 1024
        shape = f"batch_{batch_size}_after_{cached}"
        return Row("decode", shape, seconds, lambda: stages.decode(model(), batch_size, cached))

    def tower(name: str, seconds: float) -> Row:
        shape, grids = images(name)
        return Row("PaddleOCR-VL", shape, seconds, partial(patched_tower, grids, small, dtype, device))

    def jpegs(index: int, seconds: float) -> Row:
        name, photos = list((SMALL_PHOTOS if small else PHOTOS).items())[index]
        return Row("images", f"{name}_to_projector", seconds, lambda: images_to_projector(model(), photos))

    def operator(name: str, seconds: float) -> Row:
        build = partial(attention, (SMALL_ATTENTION | ATTENTION)[name], dtype, device)
        return Row("varlen_attention", name, seconds, build, CALLS_OF_AN_OPERATOR, ATTENTION_PEERS)

    def rates(name: str) -> Row:
        return Row("ceilings", name, 3, partial(ceiling, name, dtype, device, small))

    first, *others = SMALL_ATTENTION if small else ATTENTION_ROWS
    return [
        *map(rates, ("copy", "read", "matmul")),
        operator(first, 8),
        vision("1_image_1024", 32),
        prefill(1024, 17),
        vision("16_images_mixed", 9),
        tower("1_image_1024", 8),
        tower("16_images_mixed", 4),
        decode(1, 10),
        decode(8, 8),
        prefill(8192, 12),
        vision("64_frames_448", 12),
        vision("1_image_1024", 60, COMPILED),
        *(operator(name, 4) for name in others),
        jpegs(0, 6),
        jpegs(1, 12),
        vision("16_images_mixed", 60, COMPILED),
    ]
