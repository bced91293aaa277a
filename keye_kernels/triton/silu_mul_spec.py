"""The `KernelSpec` of silu_mul."""

from types import ModuleType

import torch
from torch import Tensor

from . import spec
from .device import Arch
from .launch_config import Config, ConfigKey
from .silu_mul import config_key, heuristic, silu_mul, silu_mul_kernel
from .silu_mul_cases import CHANNELS

COUNTED_ROWS = 8


class SiluMulSpec(spec.KernelSpec):
    name = "silu_mul"

    def shapes(self, workload: spec.Workload) -> list[spec.TuningShape]:
        uses = [*([1, batch] for batch in workload.get("decode", [])), *workload.get("prompts", [])]
        return [spec.TuningShape(self.name, "text", *use) for use in uses]

    def config_key(self, shape: spec.TuningShape, dtype: str) -> ConfigKey:
        return config_key(spec.TORCH_DTYPES[dtype], CHANNELS, shape.total)

    def part_of(self, key: ConfigKey) -> str:
        return "text"

    def heuristic(self, shape: spec.TuningShape, dtype: str, arch: Arch) -> Config:
        return heuristic(arch)

    def candidates(self, shape: spec.TuningShape, arch: Arch, heuristic: Config) -> list[Config]:
        tiles = [(1, 512, 64), (1, 2048, 256), (1, 1024, 64), (2, 1024, 256), (1, 4096, 256)]
        return [{"BLOCK_T": t, "BLOCK_C": c, "num_warps": threads // arch.warp_size} for t, c, threads in tiles]

    def tuning_problem(
        self, shape: spec.TuningShape, dtype: str, device: torch.device, reference: ModuleType
    ) -> spec.TuningProblem:
        gate, up = spec.random_inputs(dtype, device)(shape.total, 2 * CHANNELS).split(CHANNELS, dim=1)
        rows = spec.first_and_last(shape.total, device)

        def expect(dtype: torch.dtype) -> tuple[Tensor, ...]:
            return (reference.silu_mul(gate[rows].to(dtype), up[rows].to(dtype)),)

        return spec.TuningProblem(lambda config: (silu_mul(gate, up, config),), expect, rows)

    def variants(self, part: str, dtype: str, arch: Arch, config: Config) -> list[spec.CompileVariant]:
        signature = {
            **dict.fromkeys(("out_ptr", "gate_ptr", "up_ptr"), f"*{dtype}:16"),
            "num_rows": "i32", "stride_gate": "i32", "stride_up": "i32",
            "CHANNELS": CHANNELS, "STRIDE_UNIT": 8, "BLOCK_T": config["BLOCK_T"], "BLOCK_C": config["BLOCK_C"],
        }  # fmt: skip
        return [spec.CompileVariant(silu_mul_kernel, dtype, signature, config["num_warps"], 3, False, dtype == "bf16")]

    def shipped_variants(self, arch: Arch) -> list[spec.CompileVariant]:
        return [variant for dtype in spec.TORCH_DTYPES for variant in self.variants("text", dtype, arch, heuristic(arch))]

    def counted_cases(self, vision_batch: spec.BuildBatch) -> list[spec.CountedCase]:
        gate, up = torch.randn(COUNTED_ROWS, 2 * CHANNELS, dtype=torch.float16).split(CHANNELS, dim=1)
        arguments, limits = {"gate": gate, "up": up}, {"launches": 1, "requested": 1.02, "unique": 1.02, "idle": 0}
        label = f"silu * up, {COUNTED_ROWS} x {CHANNELS}"
        return [spec.CountedCase(self.name, label, self.name, arguments, [gate, up], limits)]


SPEC = SiluMulSpec()
