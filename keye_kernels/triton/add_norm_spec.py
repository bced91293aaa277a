"""The `KernelSpec` of add_norm."""

from types import ModuleType

import torch
from torch import Tensor

from . import spec
from .add_norm import add_norm, add_norm_kernel, config_key, heuristic
from .add_norm_cases import CHANNELS, EPS
from .device import Arch
from .launch_config import Config, ConfigKey, next_power_of_2

COUNTED_ROWS = 64


class AddNormSpec(spec.KernelSpec):
    name = "add_norm"

    def shapes(self, workload: spec.Workload) -> list[spec.TuningShape]:
        text = [*([1, batch] for batch in workload.get("decode", [])), *workload.get("prompts", [])]
        vision = [*workload.get("images", []), *workload.get("frames", [])]
        return [spec.TuningShape(self.name, part, *use) for part, uses in (("text", text), ("vision", vision)) for use in uses]

    def config_key(self, shape: spec.TuningShape, dtype: str) -> ConfigKey:
        return config_key(spec.TORCH_DTYPES[dtype], CHANNELS[shape.part], shape.total)

    def part_of(self, key: ConfigKey) -> str:
        return "text" if key["channels"] == CHANNELS["text"] else "vision"

    def heuristic(self, shape: spec.TuningShape, dtype: str, arch: Arch) -> Config:
        return heuristic(CHANNELS[shape.part], arch)

    def candidates(self, shape: spec.TuningShape, arch: Arch, heuristic: Config) -> list[Config]:
        # Rows and threads
        tiles = [(1, 128), (1, 256), (1, 512)] if shape.part == "text" else [(1, 64), (1, 128), (2, 128), (4, 256), (2, 256)]
        return [{"BLOCK_T": t, "num_warps": threads // arch.warp_size} for t, threads in tiles]

    def tuning_problem(
        self, shape: spec.TuningShape, dtype: str, device: torch.device, reference: ModuleType
    ) -> spec.TuningProblem:
        channels, normal = CHANNELS[shape.part], spec.random_inputs(dtype, device)
        x, residual = normal(shape.total, channels), normal(shape.total, channels)
        weight, bias = 1 + 0.1 * normal(channels), normal(channels) if shape.part == "vision" else None
        rows = spec.first_and_last(shape.total, device)

        def expect(dtype: torch.dtype) -> tuple[Tensor, ...]:
            norm = weight.to(dtype), None if bias is None else bias.to(dtype)
            return reference.add_norm(x[rows].to(dtype), residual[rows].to(dtype), *norm, EPS)

        return spec.TuningProblem(lambda config: add_norm(x, residual, weight, bias, EPS, config), expect, rows)

    def variants(self, part: str, dtype: str, arch: Arch, config: Config) -> list[spec.CompileVariant]:
        return [self._variant(part, dtype, config, has_residual) for has_residual in (True, False)]

    def _variant(self, part: str, dtype: str, config: Config, has_residual: bool) -> spec.CompileVariant:
        pointers, added = ("normed_ptr", "x_ptr", "weight_ptr"), f"*{dtype}:16" if has_residual else None
        signature = {
            **dict.fromkeys(pointers, f"*{dtype}:16"), "sum_ptr": added, "residual_ptr": added,
            "bias_ptr": f"*{dtype}:16" if part == "vision" else None,
            "num_rows": "i32", "eps": "fp32", "stride_x": "i32", "stride_residual": "i32",
            "CHANNELS": CHANNELS[part], "STRIDE_UNIT": 8,
            "BLOCK_T": config["BLOCK_T"], "BLOCK_C": next_power_of_2(CHANNELS[part]),
        }  # fmt: skip
        launch = config["num_warps"], 3, False, dtype == "bf16"
        label = f"{part} {dtype}{'' if has_residual else ' without residual'}"
        return spec.CompileVariant(add_norm_kernel, label, signature, *launch)

    def shipped_variants(self, arch: Arch) -> list[spec.CompileVariant]:
        return [
            variant
            for part, channels in CHANNELS.items()
            for dtype in spec.TORCH_DTYPES
            for variant in self.variants(part, dtype, arch, heuristic(channels, arch))
        ]

    def counted_cases(self, vision_batch: spec.BuildBatch) -> list[spec.CountedCase]:
        cases = []
        for part, channels in CHANNELS.items():
            x, residual = torch.randn(2, COUNTED_ROWS, channels, dtype=torch.float16).unbind(0)
            weight, bias = torch.randn(2, channels, dtype=torch.float16).unbind(0)
            arguments = {"x": x, "residual": residual, "weight": weight, "bias": bias if part == "vision" else None}
            inputs = [value for value in arguments.values() if value is not None]
            limits = {"launches": 1, "unique": 1.02, "idle": 0}
            norm = "LayerNorm" if part == "vision" else "RMSNorm"
            label = f"add + {norm}, {COUNTED_ROWS} x {channels}"
            cases.append(spec.CountedCase(f"add_norm_{part}", label, self.name, arguments, inputs, limits))
        return cases


SPEC = AddNormSpec()
