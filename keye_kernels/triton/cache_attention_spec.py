"""The `KernelSpec` of cache_attention."""

from types import ModuleType

import torch
from torch import Tensor

from . import spec
from .cache_attention import (
    COMBINE_WARPS,
    cache_attention,
    cache_attention_kernel,
    combine_kernel,
    config_key,
    heuristic,
    num_splits,
)
from .cache_attention_cases import HEAD_DIM, HEADS, KEY_HEADS
from .device import INTERPRETER_ARCH, Arch
from .launch_config import Config, ConfigKey, next_power_of_2

CACHED_TOKENS = 1024
COUNTED_TOKENS = 256


class CacheAttentionSpec(spec.KernelSpec):
    name = "cache_attention"

    def shapes(self, workload: spec.Workload) -> list[spec.TuningShape]:
        """`count` sequences, each with one new token after `size` cached ones."""
        return [spec.TuningShape(self.name, "text", batch, CACHED_TOKENS) for batch in workload.get("decode", [])]

    def config_key(self, shape: spec.TuningShape, dtype: str) -> ConfigKey:
        return config_key(spec.TORCH_DTYPES[dtype], HEAD_DIM, shape.count)

    def part_of(self, key: ConfigKey) -> str:
        return "text"

    def heuristic(self, shape: spec.TuningShape, dtype: str, arch: Arch) -> Config:
        return heuristic(spec.TORCH_DTYPES[dtype])

    def candidates(self, shape: spec.TuningShape, arch: Arch, heuristic: Config) -> list[Config]:
        return [
            {"BLOCK_N": n, "num_warps": warps, "num_stages": stages}
            for n, warps in ((16, 4), (32, 2), (32, 4), (64, 4), (128, 4), (128, 8))
            for stages in (2, 3, 4)
        ]

    def shared_bytes(self, shape: spec.TuningShape, config: Config, arch: Arch) -> int:
        buffers = config["num_stages"] if arch.is_nvidia else config["num_stages"] - 1
        return 2 * config["BLOCK_N"] * HEAD_DIM * buffers * 2  # keys and values in 16 bits

    def tuning_problem(
        self, shape: spec.TuningShape, dtype: str, device: torch.device, reference: ModuleType
    ) -> spec.TuningProblem:
        normal, batch_size, cache_slots = spec.random_inputs(dtype, device), shape.count, shape.size + 1
        q = normal(batch_size, HEADS, HEAD_DIM)
        caches = [normal(batch_size, cache_slots, KEY_HEADS, HEAD_DIM) for _ in range(2)]
        valid = torch.ones(batch_size, cache_slots, dtype=torch.bool, device=device)
        slots = torch.tensor([shape.size], device=device)
        scale, rows = HEAD_DIM**-0.5, spec.first_and_last(batch_size, device, count=4)

        def expect(dtype: torch.dtype) -> tuple[Tensor, ...]:
            given = (x[rows].to(dtype) for x in (q, *caches))
            return (reference.cache_attention(*given, valid[rows], slots, scale),)

        return spec.TuningProblem(lambda config: (cache_attention(q, *caches, valid, slots, scale, config),), expect, rows)

    def variants(self, part: str, dtype: str, arch: Arch, config: Config) -> list[spec.CompileVariant]:
        block_d, splits = next_power_of_2(HEAD_DIM), num_splits(KEY_HEADS, arch)
        sizes = {"KEY_HEADS": KEY_HEADS, "GROUP": HEADS // KEY_HEADS, "HEAD_DIM": HEAD_DIM, "NUM_SPLITS": splits}
        data = f"*{dtype}:16"
        signature = {
            "partial_ptr": "*fp32:16", "stats_ptr": "*fp32:16", "q_ptr": data, "key_ptr": data, "value_ptr": data,
            "valid_ptr": "*i1:16", "slot_ptr": "*i64:16", "scale": "fp32", "num_new": "i32", "cache_slots": "i32",
            **sizes, "ROW_BLOCKS": 1, "BLOCK_R": 16, "BLOCK_N": config["BLOCK_N"], "BLOCK_D": block_d,
        }  # fmt: skip
        combined = {
            "out_ptr": data,
            "partial_ptr": "*fp32:16",
            "stats_ptr": "*fp32:16",
            "num_new": "i32",
            **sizes,
            "BLOCK_D": block_d,
        }
        options = int(config["num_warps"]), int(config["num_stages"])
        in_forward = dtype == "bf16"
        return [
            spec.CompileVariant(cache_attention_kernel, f"text {dtype}", signature, *options, dtype != "fp32", in_forward),
            spec.CompileVariant(combine_kernel, f"text {dtype} combine", combined, COMBINE_WARPS, 3, False, in_forward),
        ]

    def shipped_variants(self, arch: Arch) -> list[spec.CompileVariant]:
        return [
            v
            for dtype, torch_dtype in spec.TORCH_DTYPES.items()
            for v in self.variants("text", dtype, arch, heuristic(torch_dtype))
        ]

    def counted_cases(self, vision_batch: spec.BuildBatch) -> list[spec.CountedCase]:
        half, used = torch.float16, COUNTED_TOKENS
        q = torch.randn(1, HEADS, HEAD_DIM, dtype=half)
        # A quarter of the cache is in use: the rest must not be read
        caches = [torch.randn(1, 4 * used, KEY_HEADS, HEAD_DIM, dtype=half) for _ in range(2)]
        valid, slots = torch.ones(1, 4 * used, dtype=torch.bool), torch.tensor([used - 1])
        arguments = {"q": q, "key_cache": caches[0], "value_cache": caches[1], "valid": valid, "slots": slots}
        inputs = [q, *(x[:, :used] for x in caches), valid[:, :used], slots]
        splits = num_splits(KEY_HEADS, INTERPRETER_ARCH)
        parts = min(splits, used // int(heuristic(half)["BLOCK_N"]))  # those with keys
        intermediate = 2 * 4 * HEADS * (parts * HEAD_DIM + 2 * splits)
        label = f"decode, {HEADS} / {KEY_HEADS} heads, {used} of {4 * used} slots"
        limits = {"launches": 2, "unique": 1.02}
        case = spec.CountedCase(
            self.name, label, self.name, arguments, inputs, limits, needed_flops=4 * HEADS * HEAD_DIM * used,
            intermediate_bytes=intermediate,
        )  # fmt: skip
        return [case]


SPEC = CacheAttentionSpec()
