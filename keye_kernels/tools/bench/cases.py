"""The operators at the model's sizes, ours and those of installed peers, to be counted in Triton's interpreter.

Each case runs one operator and knows its floor: every input read once, every output written once, no padded multiply. `limits`
are what this package holds itself to. Bytes are those of float16; bfloat16 has the same.
"""

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from keye_kernels import ops
from keye_kernels.geometry import VisionBatch

# Rope's ratios do not depend on the number of tokens, the interpreter's time does
TOKENS = 128
SEGMENT = 1024
RAGGED = (576, 252, 112, 84)
SECTIONS = [16, 24, 24]
TEXT_HEADS, KEY_HEADS, TEXT_DIM = 32, 8, 128
VISION_HEADS, VISION_DIM = 16, 72
HALF = torch.float16
# Ratios of attention do not depend on the number of heads, the interpreter's time does
ATTENTION_HEADS = 1
# Nor those of the projector on its widths, as long as tiles divide them; 16 images of 16 patches
MERGED_ROWS, CHANNELS, TEXT_WIDTH = 64, 128, 512


@dataclass(frozen=True)
class Case:
    """One call to count. `needed_flops`: without padding; 0 = nothing to multiply."""

    operator: str
    by: str  # "ours", or whose kernels
    call: Callable[[], Tensor | tuple[Tensor, ...]]
    inputs: Sequence[Tensor]
    needed_flops: int = 0
    intermediate_bytes: int = 0  # written and read once: the practical floor
    limits: dict[str, float] = field(default_factory=dict)
    expected: Callable[[], Tensor | tuple[Tensor, ...]] | None = None  # what a peer must compute


def _rope_3d() -> tuple[list, dict]:
    qkv = torch.randn(TOKENS, TEXT_HEADS + 2 * KEY_HEADS, TEXT_DIM, dtype=HALF)
    q, k = qkv[:, :TEXT_HEADS], qkv[:, TEXT_HEADS : TEXT_HEADS + KEY_HEADS]
    positions = torch.randint(0, 4000, (3, TOKENS), dtype=torch.int32)
    frequencies = 1e6 ** -(torch.arange(TEXT_DIM // 2) / (TEXT_DIM // 2))
    norms = {f"{name}_norm_weight": torch.rand(TEXT_DIM, dtype=HALF) + 0.5 for name in "qk"}
    return [q, k, positions, frequencies, SECTIONS], norms


def rope_3d() -> Case:
    arguments, norms = _rope_3d()
    return Case(
        "norm + rope_3d, 32 + 8 heads x 128",
        "ours",
        lambda: ops.rope_3d(*arguments, **norms, impl="triton"),
        [*arguments[:3], *norms.values()],
        limits={"launches": 1, "requested": 1.07, "unique": 1.02},
    )


class _Float(float):
    """A number that a kernel may cast: the interpreter, unlike the compiler, hands it Python's own."""

    def to(self, _: Any) -> "_Float":
        return self


def rope_3d_liger() -> Case:
    import triton

    mrope, rms_norm = (import_module(f"liger_kernel.ops.{name}") for name in ("qwen2vl_mrope", "rms_norm"))

    arguments, norms = _rope_3d()
    q, k, positions, frequencies, _ = arguments
    q, k = q.contiguous(), k.contiguous()  # as separate projections leave them
    angles = (positions[..., None] * frequencies).repeat(1, 1, 2)[:, None]  # [3, 1, T, D]
    cos, sin = angles.cos().to(HALF), angles.sin().to(HALF)

    def run() -> tuple[Tensor, Tensor]:
        # No offset of the weight; "llama" multiplies it in the input's dtype; rows in blocks where there are many
        options = _Float(1e-6), _Float(0.0), "llama", None
        # The device library, where its rsqrt comes from, does not run in the interpreter; Triton's own does, once patched for it
        with patch.object(rms_norm, "rsqrt", lambda x: triton.language.rsqrt(x)):
            normed = [
                rms_norm.rms_norm_forward(x, norms[f"{name}_norm_weight"], *options)[0]
                for name, x in zip("qk", (q, k), strict=True)
            ]
        turned = mrope.qwen2vl_mrope_forward(*(x.transpose(0, 1)[None] for x in normed), cos, sin, SECTIONS)[:2]
        return tuple(x[0].transpose(0, 1) for x in turned)

    expected = partial(ops.rope_3d, *arguments, **norms, impl="reference")
    return Case(rope_3d().operator, "Liger", run, [q, k, positions, *norms.values()], expected=expected)


def _rope_2d() -> list[Tensor]:
    q, k, _ = torch.randn(TOKENS, 3, VISION_HEADS, VISION_DIM, dtype=HALF).unbind(1)
    positions = torch.stack((torch.arange(TOKENS) // 32, torch.arange(TOKENS) % 32)).int()
    return [q, k, positions, 1e4 ** -(torch.arange(VISION_DIM // 4) / (VISION_DIM // 4))]


def rope_2d() -> Case:
    arguments = _rope_2d()
    return Case(
        "rope_2d, 16 + 16 heads x 72",
        "ours",
        lambda: ops.rope_2d(*arguments, impl="triton"),
        arguments[:3],
        limits={"launches": 1, "requested": 1.05},
    )


def rope_2d_flash_attn() -> Case:
    q, k, positions, frequencies = arguments = _rope_2d()
    angles = (positions.T[..., None] * frequencies).flatten(1)  # [T, D/2], rows then columns
    cos, sin = angles.cos(), angles.sin()
    rotary = _flash_attn_rotary()

    def run() -> tuple[Tensor, Tensor]:
        # As the official code calls it: in float32
        return tuple(rotary.apply_rotary(x.float()[None], cos, sin)[0].to(HALF) for x in (q, k))

    expected = partial(ops.rope_2d, *arguments, impl="reference")
    return Case(rope_2d().operator, "flash-attn", run, arguments[:3], expected=expected)


def _flash_attn_rotary() -> ModuleType:
    """The file alone: the package around it does not import without a GPU."""
    (folder,) = importlib.util.find_spec("flash_attn").submodule_search_locations
    spec = importlib.util.spec_from_file_location("flash_attn_rotary", f"{folder}/ops/triton/rotary.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def attention(lengths: Sequence[int], rows: int, limit: float) -> Case:
    """In tiles of `rows` queries, as a table would say; otherwise the heuristic's for sm_90."""
    from keye_kernels.triton import varlen_attention

    q, k, v = torch.randn(sum(lengths), 3, ATTENTION_HEADS, VISION_DIM, dtype=HALF).unbind(1)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    tile = varlen_attention.heuristic(90, VISION_DIM, HALF) | {"BLOCK_M": rows}
    shape = f"one segment of {lengths[0]}" if len(lengths) == 1 else " + ".join(map(str, lengths))

    def call() -> Tensor:
        with patch.object(varlen_attention, "_config", lambda *case: tile):
            return ops.varlen_attention(q, k, v, cu_seqlens, max(lengths), impl="triton")

    return Case(
        f"varlen_attention, D 72, {shape}, {rows} queries a tile",
        "ours",
        call,
        [q, k, v],
        needed_flops=sum(4 * VISION_DIM * length**2 * ATTENTION_HEADS for length in lengths),
        limits={"launches": 1, "multiplies": limit, "idle": 0},
    )


def patch_merge() -> Case:
    batch = VisionBatch.build(torch.tensor([[1, 4, MERGED_ROWS // 16]] * 16), 4 * MERGED_ROWS, table_side=27)
    wide = 4 * CHANNELS
    features = torch.randn(4 * MERGED_ROWS, CHANNELS, dtype=HALF)
    sizes = (CHANNELS,), (CHANNELS,), (wide, wide), (wide,), (TEXT_WIDTH, wide), (TEXT_WIDTH,)
    weights = [torch.randn(size, dtype=HALF) * size[-1] ** -0.5 for size in sizes]
    return Case(
        f"patch_merge_projection, 16 images, widths {wide} and {TEXT_WIDTH} (practical floor)",
        "ours",
        lambda: ops.patch_merge_projection(features, batch, *weights, impl="triton"),
        [features, *weights],
        needed_flops=2 * MERGED_ROWS * wide * (wide + TEXT_WIDTH),
        intermediate_bytes=2 * MERGED_ROWS * wide * HALF.itemsize,
        limits={"launches": 3, "unique": 1.05, "idle": 0},
    )


def position_embedding() -> Case:
    grid = torch.tensor([[1, 4, 4]] * 16)
    batch = VisionBatch.build(grid, int(grid.prod(1).sum()), table_side=27)
    features, table = torch.randn(len(batch.raster_index), 1152, dtype=HALF), torch.randn(729, 1152, dtype=HALF)
    used = table[batch.corner_index.unique()]
    return Case(
        "position_embedding_2d, 16 images",
        "ours",
        lambda: ops.position_embedding_2d(features, table, batch, impl="triton"),
        [features, used, batch.corner_index, batch.corner_weight],
        limits={"launches": 1, "unique": 1.05, "idle": 0},
    )


# In the order of the table; a peer's case names the package that it needs
CASES: dict[str, tuple[Callable[[], Case], str | None]] = {
    "rope_3d": (rope_3d, None),
    "rope_3d liger": (rope_3d_liger, "liger_kernel"),
    "rope_2d": (rope_2d, None),
    "rope_2d flash_attn": (rope_2d_flash_attn, "flash_attn"),
    "attention 1024": (lambda: attention((SEGMENT,), 128, 1.06), None),
    "attention ragged, small tile": (lambda: attention(RAGGED, 64, 1.10), None),
    "attention ragged, large tile": (lambda: attention(RAGGED, 128, 1.30), None),
    "patch_merge": (patch_merge, None),
    "position_embedding": (position_embedding, None),
}


def count_case(name: str) -> dict[str, Any]:
    """Counts one of `CASES`; in a process whose Triton interprets. Raises ValueError where a peer computes something else."""
    from .traffic import count_traffic, tensor_bytes

    torch.manual_seed(0)
    case = CASES[name][0]()
    # A peer that guards its launch by the tensor's GPU finds none here
    with patch.object(torch.cuda, "device", lambda _: nullcontext()), count_traffic() as traffic:
        outputs = case.call()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if case.expected is not None:
        for output, expected in zip(outputs, case.expected(), strict=True):
            if (output.float() - expected.float()).abs().max() > 2e-2 * expected.float().abs().max():
                raise ValueError(f"{case.by} computes something else than {case.operator}")
    floor = tensor_bytes(*case.inputs, *outputs) + case.intermediate_bytes
    row = {
        "operator": case.operator,
        "by": case.by,
        "launches": len(traffic.launches),
        "eager_operators": len(traffic.eager_operators),
        "floor_bytes": floor,
        "requested": traffic.requested / floor,
        "unique": traffic.unique / floor,
        "multiplies": traffic.dot_flops / case.needed_flops if case.needed_flops else None,
        "idle": traffic.idle_programs,
        "limits": case.limits,
    }
    return {**row, "above": [key for key, limit in case.limits.items() if row[key] > limit]}
