"""What the tuner asks of each kernel: its table's key, its heuristic, and the variants that a tile must compile for."""

from typing import Any

import torch

from keye_kernels.triton import matmul, patch_merge, position_embedding, rope, varlen_attention
from keye_kernels.triton.spec import CompileSpec
from keye_kernels.triton.tiles import Case, Config

from .shapes import MERGED, Shape

CHANNELS, OUT = 1152, 4096
HIDDEN = MERGED * CHANNELS  # also the width of a merged row
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Fields that agree between the buckets of a case, so that results do not depend on what else is in a batch
SAME = {"varlen_attention": ("path", "BLOCK_N")}


def arch_of(target: str) -> int | str:
    """As the kernels' compile_specs take it."""
    return int(target[3:]) if target.startswith("sm_") else target


def warp_size(target: str) -> int:
    return 32 if target.startswith("sm_") else 64


def table_key(shape: Shape, dtype: str) -> Case:
    """The case under which the launch path looks the tile up."""
    kind = DTYPES[dtype]
    if shape.kernel == "rope":
        return rope.tile_key(kind, _rope_part(shape.part)[1], shape.total)
    if shape.kernel == "position_embedding_2d":
        return position_embedding.tile_key(kind, CHANNELS, shape.total)
    if shape.kernel == "varlen_attention":
        _, _, head_dim = attention_part(shape.part)
        return varlen_attention.tile_key(kind, head_dim, shape.size, shape.part == "text")
    if shape.kernel == "linear":
        return matmul.tile_key(shape.total, kind, columns=OUT)
    return matmul.tile_key(shape.total, kind, channels=CHANNELS, order=shape.part)


def heuristic(shape: Shape, dtype: str, target: str, processors: int) -> Config:
    """The tile without a table."""
    kind, arch = DTYPES[dtype], arch_of(target)
    number = 0 if isinstance(arch, str) else arch  # as the products count
    if shape.kernel == "rope":
        return rope.heuristic(_rope_part(shape.part)[1], warp_size(target))
    if shape.kernel == "position_embedding_2d":
        return position_embedding.heuristic(warp_size(target))
    if shape.kernel == "varlen_attention":
        return varlen_attention.heuristic(arch, attention_part(shape.part)[2], kind)
    if shape.kernel == "linear":
        return matmul.matmul_tile(number, processors, shape.total, OUT, kind)
    gathered = shape.part == "raster"
    return patch_merge.heuristic(number, processors, shape.total, kind, HIDDEN, HIDDEN, OUT, gathered)


def own_heuristic(shape: Shape, dtype: str, target: str, processors: int) -> Config:
    """The heuristic's tile, for the kernel here where the heuristic leaves a product to torch: what can be ranked."""
    config = heuristic(shape, dtype, target, processors)
    return config | {"path": "triton"} if "path" in config else config


def specs(kernel: str, part: str, dtype: str, target: str, config: Config) -> list[CompileSpec]:
    """All variants of the kernel that one entry of a table serves, the commonest first."""
    if kernel == "rope":
        sizes = _rope_part(part)
        if part == "vision":
            variants = [(None, False), (None, True)]
        else:
            variants = [(dtype, False), ("fp32", False), (None, False), (None, True)]
        return [rope.compile_spec(_label(part, *v), config, dtype, v[0], *sizes, conjugate=v[1]) for v in variants]
    if kernel == "position_embedding_2d":
        return [position_embedding.compile_spec(dtype, config)]
    if config["path"] in ("cublas", "torch"):
        return []
    if kernel == "varlen_attention":
        common = arch_of(target), config, dtype, *attention_part(part), part == "text"
        return [varlen_attention.compile_spec(_label(part, lse), *common, return_lse=lse) for lse in (False, True)]
    if kernel == "linear":
        return [matmul.compile_spec(dtype, config)]
    if config["path"] == "merged":
        return [matmul.compile_spec(dtype, config, gelu=True)]
    fused = {"fused": (True,), "separate": (False,)}[config["statistics"]]
    return [
        patch_merge.compile_spec(_label(part, width, f), dtype, config, width, part == "raster", f)
        for f in fused
        for width in (CHANNELS, HIDDEN)
    ]


def attention_part(part: str) -> tuple[int, int, int]:
    """(query heads, key heads, head dim)"""
    return varlen_attention.VISION if part == "vision" else varlen_attention.TEXT


def _rope_part(part: str) -> tuple[tuple[int, int], int, tuple[int, ...], int]:
    return rope.VISION if part == "vision" else rope.TEXT


def _label(*parts: Any) -> str:
    return " ".join(map(str, parts))
