"""The `KernelSpec` of varlen_attention."""

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import spec
from .device import INTERPRETER_ARCH, Arch
from .launch_config import Config, ConfigKey
from .tma import descriptor_types
from .varlen_attention import config_key, head_parts, heuristic, key_blocks, varlen_attention
from .varlen_attention_kernel import varlen_attention_fwd_kernel


class Sizes(NamedTuple):
    """One use of the kernel in Keye-VL-8B."""

    heads: int
    key_heads: int
    head_dim: int
    causal: bool


SIZES = {"vision": Sizes(16, 16, 72, False), "text": Sizes(32, 8, 128, True)}
MIN_SEQLEN_FOR_TMA = 1024  # below, building four descriptors on the CPU takes longer than the kernel
MIN_ROWS_PER_WARP = 16  # of a tensor-core matmul
# Segment lengths of the counted ragged batch. One head is enough: the ratios do not depend on the number of heads
COUNTED_RAGGED = (576, 252, 112, 84)


class VarlenAttentionSpec(spec.KernelSpec):
    name = "varlen_attention"
    fields_shared_by_buckets = ("backend", "BLOCK_N")

    def shapes(self, workload: spec.Workload) -> list[spec.TuningShape]:
        # Decoding attends to its cache without this kernel
        vision = [*workload.get("images", []), *workload.get("frames", [])]
        uses = {"vision": vision, "text": workload.get("prompts", [])}
        return [spec.TuningShape(self.name, part, *use) for part in uses for use in uses[part]]

    def config_key(self, shape: spec.TuningShape, dtype: str) -> ConfigKey:
        sizes = SIZES[shape.part]
        return config_key(spec.TORCH_DTYPES[dtype], sizes.head_dim, shape.size, sizes.causal)

    def part_of(self, key: ConfigKey) -> str:
        return "text" if key["head_dim"] == SIZES["text"].head_dim else "vision"

    def heuristic(self, shape: spec.TuningShape, dtype: str, arch: Arch) -> Config:
        return heuristic(arch, SIZES[shape.part].head_dim, spec.TORCH_DTYPES[dtype])

    def candidates(self, shape: spec.TuningShape, arch: Arch, heuristic: Config) -> list[Config]:
        libraries = [{"backend": "torch"}] if arch.is_nvidia else []
        use_tma = (False, True) if arch.has_tma and shape.size > MIN_SEQLEN_FOR_TMA else (False,)
        return libraries + [
            {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages, "use_tma": tma, "backend": "triton"}
            for m in (64, 128)
            for n in (32, 64, 128)
            for warps in (4, 8)
            for stages in (1, 2, 3, 4)
            for tma in use_tma
            if m // warps >= MIN_ROWS_PER_WARP
        ]

    def shared_bytes(self, shape: spec.TuningShape, config: Config, arch: Arch) -> int:
        buffers = config["num_stages"] if arch.is_nvidia else config["num_stages"] - 1
        return 2 * config["BLOCK_N"] * SIZES[shape.part].head_dim * buffers * 2  # k and v in 16 bits

    def tuning_problem(
        self, shape: spec.TuningShape, dtype: str, device: torch.device, reference: ModuleType
    ) -> spec.TuningProblem:
        (heads, key_heads, head_dim, causal), normal = SIZES[shape.part], spec.random_inputs(dtype, device)
        q, k, v = (normal(shape.total, n, head_dim) for n in (heads, key_heads, key_heads))
        cu_seqlens = torch.arange(0, shape.total + 1, shape.size, dtype=torch.int32, device=device)
        scale = head_dim**-0.5
        # The first and the last segment are compared
        segments = sorted({0, shape.count - 1})
        rows = torch.cat([torch.arange(s * shape.size, (s + 1) * shape.size, device=device) for s in segments])

        def expect(dtype: torch.dtype) -> tuple[Tensor, ...]:
            parts = (x[rows].to(dtype) for x in (q, k, v))
            return (reference.varlen_attention(*parts, cu_seqlens[: len(segments) + 1], scale, causal, False)[0],)

        def launch(config: Config) -> tuple[Tensor, ...]:
            if config["backend"] == "torch":
                options = (shape.size, shape.size, 0.0, causal, False)
                return torch.ops.aten._flash_attention_forward(q, k, v, cu_seqlens, cu_seqlens, *options, scale=scale)[:1]
            common = q, k, v, cu_seqlens, shape.size, scale, causal, False
            return varlen_attention(*common, covers_all_tokens=True, config=config)[:1]

        return spec.TuningProblem(launch, expect, rows)

    def variants(self, part: str, dtype: str, arch: Arch, config: Config) -> list[spec.CompileVariant]:
        if config["backend"] != "triton":
            return []
        kinds = [(True, False), (False, False), (True, True)]  # (tiles from a host schedule, lse)
        return [_variant(part, dtype, arch, config, *kind) for kind in kinds]

    def shipped_variants(self, arch: Arch) -> list[spec.CompileVariant]:
        found = []
        for part, sizes in SIZES.items():
            for dtype, torch_dtype in spec.TORCH_DTYPES.items():
                config = heuristic(arch, sizes.head_dim, torch_dtype)
                found += self.variants(part, dtype, arch, config)
                if arch.has_tma and dtype == "bf16":
                    found.append(_variant(part, dtype, arch, config | {"use_tma": True}, True, False))
        return found

    def counted_cases(self, vision_batch: spec.BuildBatch) -> list[spec.CountedCase]:
        return [
            _counted_case("attention 1024", (1024,), 128, 1.06),
            _counted_case("attention ragged, 64 rows", COUNTED_RAGGED, 64, 1.10),
            _counted_case("attention ragged, 128 rows", COUNTED_RAGGED, 128, 1.30),
        ]


def _variant(part: str, dtype: str, arch: Arch, config: Config, has_schedule: bool, return_lse: bool) -> spec.CompileVariant:
    heads, key_heads, head_dim, causal = SIZES[part]
    data, parts = f"*{dtype}:16", head_parts(head_dim, arch)
    descriptors = descriptor_types(config, dtype, *key_blocks(config["BLOCK_N"], parts))
    # Strides as in the model: q and k are outputs of the rotation, v is a view of the fused projection
    signature = {
        "out_ptr": data, "lse_ptr": "*fp32:16", "q_ptr": data, "k_ptr": data, "v_ptr": data,
        **dict(zip(("k_desc", "k_tail_desc", "v_desc", "v_tail_desc"), descriptors, strict=True)),
        "schedule_ptr": "*i32:16" if has_schedule else None, "cu_seqlens_ptr": None if has_schedule else "*i32:16",
        "scale": "fp32", "num_segments": "i32", "num_tokens": "i32", "num_tiles": "i32", "heads_per_l2_group": "i32",
        "stride_q_head": "i32", "stride_k_head": "i32", "stride_v_head": "i32", "STRIDE_Q": heads * head_dim,
        "STRIDE_K": key_heads * head_dim, "STRIDE_V": (heads + 2 * key_heads) * head_dim, "STRIDE_UNIT": 8,
        "NUM_HEADS": heads, "GROUP": heads // key_heads, "HEAD_DIM": head_dim, **parts,
        "CAUSAL": causal, "RETURN_LSE": return_lse, "BLOCK_M": config["BLOCK_M"], "BLOCK_N": config["BLOCK_N"],
    }  # fmt: skip
    label = f"{part} {dtype}{'' if has_schedule else ' searched'}{' lse' if return_lse else ''}"
    label += " TMA" if config["use_tma"] else ""
    launch = config["num_warps"], config["num_stages"], dtype != "fp32", label == "vision bf16"
    scores = config["BLOCK_M"] * config["BLOCK_N"]
    return spec.CompileVariant(varlen_attention_fwd_kernel, label, signature, *launch, scores_per_iteration=scores)


def _counted_case(name: str, lengths: Sequence[int], block_m: int, limit: float) -> spec.CountedCase:
    head_dim, half = SIZES["vision"].head_dim, torch.float16
    q, k, v = torch.randn(sum(lengths), 3, 1, head_dim, dtype=half).unbind(1)
    arguments = {"q": q, "k": k, "v": v, "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int()}
    shape = f"one segment of {lengths[0]}" if len(lengths) == 1 else " + ".join(map(str, lengths))
    label = f"varlen_attention, D {head_dim}, {shape}, BLOCK_M {block_m}"
    limits, arguments = {"launches": 1, "multiplies": limit, "idle": 0}, {**arguments, "max_seqlen": max(lengths)}
    flops = sum(4 * head_dim * length**2 for length in lengths)
    config = heuristic(INTERPRETER_ARCH, head_dim, half) | {"BLOCK_M": block_m}
    return spec.CountedCase(name, label, "varlen_attention", arguments, [q, k, v], limits, needed_flops=flops, config=config)


SPEC = VarlenAttentionSpec()
