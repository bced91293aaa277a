"""The `KernelSpec` of linear: the projector's two linear layers. Verified and counted with patch_merge_norm."""

from types import ModuleType

import torch
from torch import Tensor

from . import spec
from .device import Arch
from .launch_config import Config, ConfigKey
from .linear import GROUP_M, config_key, heuristic, linear, linear_kernel
from .patch_merge_norm_cases import MERGED_WIDTH, OUT_WIDTH
from .patch_merge_norm_spec import merged_uses
from .tma import descriptor_types

# Output features of each layer; only the first is followed by GELU
COLUMNS = {"linear_1": MERGED_WIDTH, "linear_2": OUT_WIDTH}
# Numbers of rows that together use every config of the heuristic
SHIPPED_ROWS = (64, 256, 1024, 4096)


class LinearSpec(spec.KernelSpec):
    name = "linear"

    def shapes(self, workload: spec.Workload) -> list[spec.TuningShape]:
        return [spec.TuningShape(self.name, part, *use) for part in COLUMNS for use in merged_uses(workload)]

    def config_key(self, shape: spec.TuningShape, dtype: str) -> ConfigKey:
        return config_key(shape.total, COLUMNS[shape.part], spec.TORCH_DTYPES[dtype], shape.part == "linear_1")

    def part_of(self, key: ConfigKey) -> str:
        return "linear_1" if key["epilogue"] == "gelu" else "linear_2"

    def heuristic(self, shape: spec.TuningShape, dtype: str, arch: Arch) -> Config:
        return heuristic(arch, shape.total, COLUMNS[shape.part], spec.TORCH_DTYPES[dtype])

    def candidates(self, shape: spec.TuningShape, arch: Arch, heuristic: Config) -> list[Config]:
        tiles = [(128, 256, 8), (128, 128, 8), (64, 128, 4), (64, 64, 4), (128, 128, 4), (64, 256, 8), (64, 256, 4)]
        sizes = [{"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "backend": "triton"} for m, n, warps in tiles]
        use_tma = (False, True) if arch.has_tma else (False,)
        return [{"backend": "torch"}, *({**size, "use_tma": tma} for size in sizes for tma in use_tma)]

    def refinements(self, config: Config) -> list[Config]:
        return [{"BLOCK_K": k, "num_stages": stages} for k in (32, 64, 128) for stages in (2, 3, 4, 5)]

    def shared_bytes(self, shape: spec.TuningShape, config: Config, arch: Arch) -> int:
        # wgmma and tcgen05 read both operands from shared memory, mma.sync may read one from registers
        buffers = config["num_stages"] if arch.is_nvidia else config["num_stages"] - 1
        return config["BLOCK_N"] * config["BLOCK_K"] * buffers * 2

    def tuning_problem(
        self, shape: spec.TuningShape, dtype: str, device: torch.device, reference: ModuleType
    ) -> spec.TuningProblem:
        normal, columns, gelu = spec.random_inputs(dtype, device), COLUMNS[shape.part], shape.part == "linear_1"
        x, weight = normal(shape.total, MERGED_WIDTH), normal(columns, MERGED_WIDTH, scale=MERGED_WIDTH**-0.5)
        bias, rows = normal(columns), spec.first_and_last(shape.total, device)

        def expect(dtype: torch.dtype) -> tuple[Tensor, ...]:
            out = torch.nn.functional.linear(x[rows].to(dtype), weight.to(dtype), bias.to(dtype))
            return (torch.nn.functional.gelu(out) if gelu else out,)

        return spec.TuningProblem(lambda config: (linear(x, weight, bias, gelu, config=config),), expect, rows)

    def variants(self, part: str, dtype: str, arch: Arch, config: Config) -> list[spec.CompileVariant]:
        if config["backend"] != "triton":
            return []
        x_block, weight_block = ([config[name], config["BLOCK_K"]] for name in ("BLOCK_M", "BLOCK_N"))
        descriptors = descriptor_types(config, dtype, x_block, weight_block)
        signature = {
            **dict.fromkeys(("out_ptr", "x_ptr", "weight_ptr", "bias_ptr"), f"*{dtype}:16"),
            **dict(zip(("x_desc", "weight_desc"), descriptors, strict=True)),
            **{"num_rows": "i32", "IN": MERGED_WIDTH, "OUT": COLUMNS[part], "GELU": part == "linear_1"},
            **{name: config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")},
            "GROUP_M": GROUP_M,
        }
        label = f"{part} {dtype} {config['BLOCK_M']}x{config['BLOCK_N']}{' TMA' if config['use_tma'] else ''}"
        in_bf16_forward = dtype == "bf16" and config["BLOCK_M"] == 128 and not config["use_tma"]
        launch = config["num_warps"], config["num_stages"], dtype != "fp32", in_bf16_forward
        return [spec.CompileVariant(linear_kernel, label, signature, *launch)]

    def shipped_variants(self, arch: Arch) -> list[spec.CompileVariant]:
        found = {}
        for part, columns in COLUMNS.items():
            for dtype in spec.TORCH_DTYPES:
                for rows in SHIPPED_ROWS:
                    config = heuristic(arch, rows, columns, spec.TORCH_DTYPES[dtype]) | {"backend": "triton"}
                    for use_tma in (False, True) if arch.has_tma and dtype == "bf16" else (False,):
                        for variant in self.variants(part, dtype, arch, config | {"use_tma": use_tma}):
                            found[variant.label] = variant
        return list(found.values())


SPEC = LinearSpec()
