"""The `KernelSpec` of position_embedding_2d."""

from types import ModuleType

import torch
from torch import Tensor

from . import spec
from .device import Arch
from .launch_config import Config, ConfigKey
from .position_embedding_2d import config_key, heuristic, position_embedding_2d, position_embedding_2d_kernel
from .position_embedding_2d_cases import CHANNELS, TABLE_ROWS


class PositionEmbeddingSpec(spec.KernelSpec):
    name = "position_embedding_2d"

    def shapes(self, workload: spec.Workload) -> list[spec.TuningShape]:
        uses = [*workload.get("images", []), *workload.get("frames", [])]
        return [spec.TuningShape(self.name, "vision", *use) for use in uses]

    def config_key(self, shape: spec.TuningShape, dtype: str) -> ConfigKey:
        return config_key(spec.TORCH_DTYPES[dtype], CHANNELS, shape.total)

    def part_of(self, key: ConfigKey) -> str:
        return "vision"

    def heuristic(self, shape: spec.TuningShape, dtype: str, arch: Arch) -> Config:
        return heuristic(arch)

    def candidates(self, shape: spec.TuningShape, arch: Arch, heuristic: Config) -> list[Config]:
        # 1152 channels are nine blocks of 128: wider blocks leave lanes without work
        tiles = [(1, 128, 64), (2, 128, 64), (8, 128, 128), (4, 128, 128), (8, 128, 64), (16, 128, 256)]
        return [{"BLOCK_T": t, "BLOCK_C": c, "num_warps": threads // arch.warp_size} for t, c, threads in tiles]

    def tuning_problem(
        self, shape: spec.TuningShape, dtype: str, device: torch.device, reference: ModuleType
    ) -> spec.TuningProblem:
        normal = spec.random_inputs(dtype, device)
        features, table = normal(shape.total, CHANNELS), normal(TABLE_ROWS, CHANNELS)
        corner = torch.arange(4, device=device) + torch.arange(shape.total, device=device)[:, None]
        index, weight = (corner % TABLE_ROWS).int(), torch.full(corner.shape, 0.25, device=device)
        rows = spec.first_and_last(shape.total, device)

        def expect(dtype: torch.dtype) -> tuple[Tensor, ...]:
            rounded = features[rows].to(dtype), table.to(dtype)
            return (reference.position_embedding_2d(*rounded, index[rows], weight[rows]),)

        return spec.TuningProblem(lambda config: (position_embedding_2d(features, table, index, weight, config),), expect, rows)

    def variants(self, part: str, dtype: str, arch: Arch, config: Config) -> list[spec.CompileVariant]:
        signature = {
            "out_ptr": f"*{dtype}:16", "features_ptr": f"*{dtype}:16", "table_ptr": f"*{dtype}:16",
            "index_ptr": "*i32:16", "weight_ptr": "*fp32:16", "num_patches": "i32", "stride_token": "i32",
            "CHANNELS": CHANNELS, "STRIDE_UNIT": 8, "BLOCK_T": config["BLOCK_T"], "BLOCK_C": config["BLOCK_C"],
        }  # fmt: skip
        launch = config["num_warps"], 3, False, dtype == "bf16"
        return [spec.CompileVariant(position_embedding_2d_kernel, dtype, signature, *launch)]

    def shipped_variants(self, arch: Arch) -> list[spec.CompileVariant]:
        return [variant for dtype in spec.TORCH_DTYPES for variant in self.variants("vision", dtype, arch, heuristic(arch))]

    def counted_cases(self, vision_batch: spec.BuildBatch) -> list[spec.CountedCase]:
        batch = vision_batch(torch.tensor([[1, 4, 4]] * 16))
        features = torch.randn(len(batch.raster_index), CHANNELS, dtype=torch.float16)
        table = torch.randn(TABLE_ROWS, CHANNELS, dtype=torch.float16)
        inputs = [features, table[batch.corner_index.unique()], batch.corner_index, batch.corner_weight]
        arguments = {"features": features, "table": table, "grid_thw": batch}
        limits = {"launches": 1, "unique": 1.05, "idle": 0}
        return [spec.CountedCase(self.name, "position_embedding_2d, 16 images", self.name, arguments, inputs, limits)]


SPEC = PositionEmbeddingSpec()
