"""The `KernelSpec` of linear_few_rows: the linear layers of a decoding step."""

from types import ModuleType

import torch
from torch import Tensor

from . import spec
from .device import Arch
from .launch_config import Config, ConfigKey, next_power_of_2
from .linear_few_rows import config_key, has_pdl, heuristic, launch_constants, linear_few_rows, linear_few_rows_kernel, uses_dot
from .linear_few_rows_cases import LAYERS, MAX_ROWS, Layer

SHIPPED_ROWS = (1, 4, 8, 16)  # one for each kind of loop and number of sums
COUNTED_COLUMNS, COUNTED_WIDTH = 64, 4096


class LinearFewRowsSpec(spec.KernelSpec):
    name = "linear_few_rows"

    def shapes(self, workload: spec.Workload) -> list[spec.TuningShape]:
        rows = [batch for batch in workload.get("decode", []) if batch <= MAX_ROWS]
        return [spec.TuningShape(self.name, part_of(layer, count), 1, count) for layer in LAYERS for count in rows]

    def config_key(self, shape: spec.TuningShape, dtype: str) -> ConfigKey:
        layer, _ = layer_and_rows(shape.part)
        return config_key(shape.total, layer.columns, layer.width, spec.TORCH_DTYPES[dtype], layer.silu_mul)

    def part_of(self, key: ConfigKey) -> str:
        found = (name for name, layer in LAYERS.items() if (layer.columns, layer.width) == (key["columns"], key["width"]))
        return part_of(next(found), int(key["block_rows"]))

    def heuristic(self, shape: spec.TuningShape, dtype: str, arch: Arch) -> Config:
        return heuristic(arch, shape.total, spec.TORCH_DTYPES[dtype], layer_and_rows(shape.part)[0].silu_mul)

    def candidates(self, shape: spec.TuningShape, arch: Arch, heuristic: Config) -> list[Config]:
        warps = heuristic["num_warps"]
        if "BLOCK_N" in heuristic:
            sizes = [(n, k, count) for n in (16, 32) for k in (64, 128) for count in (warps // 2, warps, 2 * warps)]
            own = [{"BLOCK_N": n, "BLOCK_K": k, "num_warps": count} for n, k, count in sizes]
        else:
            own = [{"BLOCK_C": n, "num_warps": count} for n in (1, 2, 4, 8) for count in (warps // 2, warps, 2 * warps)]
        return [{**size, "backend": "triton"} for size in own]

    def refinements(self, config: Config) -> list[Config]:
        return [{"num_stages": stages} for stages in (2, 3, 4)] if "num_stages" in config else []

    def tuning_problem(
        self, shape: spec.TuningShape, dtype: str, device: torch.device, reference: ModuleType
    ) -> spec.TuningProblem:
        columns, width, silu_mul, has_residual = layer_and_rows(shape.part)[0]
        normal = spec.random_inputs(dtype, device)
        x, weight = normal(shape.total, width), normal(columns * (1 + silu_mul), width, scale=width**-0.5)
        residual = normal(shape.total, columns) if has_residual else None

        def launch(config: Config) -> tuple[Tensor, ...]:
            return (linear_few_rows(x, weight, None, residual, silu_mul, config=config),)

        def expect(dtype: torch.dtype) -> tuple[Tensor, ...]:
            added = None if residual is None else residual.to(dtype)
            return (reference.linear_few_rows(x.to(dtype), weight.to(dtype), None, added, silu_mul),)

        return spec.TuningProblem(launch, expect, torch.arange(shape.total, device=device))

    def variants(self, part: str, dtype: str, arch: Arch, config: Config) -> list[spec.CompileVariant]:
        return [_variant(part, dtype, arch, config)] if config["backend"] == "triton" else []

    def shipped_variants(self, arch: Arch) -> list[spec.CompileVariant]:
        """Both epilogues in each dtype. The other layers differ from qkv in the number of programs only."""
        kinds = [(layer, dtype) for layer in ("gate_up", "down") for dtype in spec.TORCH_DTYPES] + [("qkv", "bf16")]
        found = []
        for layer, dtype in kinds:
            for rows in SHIPPED_ROWS:
                config = heuristic(arch, rows, spec.TORCH_DTYPES[dtype], LAYERS[layer].silu_mul)
                for use_pdl in (False, True) if dtype == "bf16" and has_pdl(arch) else (False,):
                    found.append(_variant(part_of(layer, rows), dtype, arch, config | {"use_pdl": use_pdl}))
        return found

    def counted_cases(self, vision_batch: spec.BuildBatch) -> list[spec.CountedCase]:
        cases = []
        for rows, silu_mul, requested in ((1, False, 1.25), (1, True, 1.25), (8, True, 1.18)):
            weight_rows = COUNTED_COLUMNS * (1 + silu_mul)
            x, weight = torch.randn(rows, COUNTED_WIDTH).half(), torch.randn(weight_rows, COUNTED_WIDTH).half() / 64
            residual = None if silu_mul else torch.randn(rows, COUNTED_COLUMNS).half()
            arguments = {"x": x, "weight": weight, "residual": residual, "silu_mul": silu_mul}
            inputs = [tensor for tensor in (x, weight, residual) if tensor is not None]
            epilogue = "silu * up" if silu_mul else "+ residual"
            limits = {"launches": 1, "requested": requested, "unique": 1.02, "idle": 0}
            name = f"linear_few_rows, {rows} rows, {epilogue}"
            flops = 2 * rows * weight.numel() if uses_dot(rows, x.dtype) else 0
            cases.append(spec.CountedCase(name, name, self.name, arguments, inputs, limits, flops))
        return cases


def part_of(layer: str, rows: int) -> str:
    """The number of rows is in the name of a part, because a config may need too many registers for more rows."""
    return f"{layer} {next_power_of_2(rows)} rows"


def layer_and_rows(part: str) -> tuple[Layer, int]:
    layer, rows, _ = part.split()
    return LAYERS[layer], int(rows)


def _variant(part: str, dtype: str, arch: Arch, config: Config) -> spec.CompileVariant:
    (layer, rows), data = layer_and_rows(part), f"*{dtype}:16"
    constants = launch_constants(config, spec.TORCH_DTYPES[dtype], rows, layer.width, arch)
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages", 3)
    constants.pop("launch_pdl", None)
    signature = {
        "out_ptr": data, "x_ptr": data, "weight_ptr": data, "bias_ptr": None, "residual_ptr": data if layer.residual else None,
        "num_rows": "i32", "IN": layer.width, "OUT": layer.columns, "SILU_MUL": layer.silu_mul, **constants,
    }  # fmt: skip
    label = f"{part} {dtype}{' PDL' if constants['USE_PDL'] else ''}"
    # Those with a loop that is not unrolled: its accesses are counted
    in_forward = label in ("down 1 rows bf16", "down 8 rows bf16", "gate_up 8 rows bf16")
    return spec.CompileVariant(linear_few_rows_kernel, label, signature, warps, stages, constants["SLICES"] > 0, in_forward)


SPEC = LinearFewRowsSpec()
