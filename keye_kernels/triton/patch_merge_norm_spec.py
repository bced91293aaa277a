"""The `KernelSpec` of patch_merge_norm, with the counted case of the whole projector."""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from . import spec
from .device import Arch
from .launch_config import Config, ConfigKey
from .patch_merge_norm import config_key, heuristic, patch_merge_norm, patch_merge_norm_kernel
from .patch_merge_norm_cases import CHANNELS, MERGED_WIDTH, PATCHES

# Counted at small sizes: the ratios do not depend on the widths as long as the tiles divide them
COUNTED_ROWS, COUNTED_CHANNELS, COUNTED_OUT = 64, 128, 512


def merged_uses(workload: spec.Workload) -> list[tuple[int, int]]:
    """(count, merged rows) of the images and frames of a workload."""
    return [(count, size // PATCHES) for count, size in (*workload.get("images", []), *workload.get("frames", []))]


class PatchMergeNormSpec(spec.KernelSpec):
    name = "patch_merge_norm"

    def shapes(self, workload: spec.Workload) -> list[spec.TuningShape]:
        return [spec.TuningShape(self.name, "vision", *use) for use in merged_uses(workload)]

    def config_key(self, shape: spec.TuningShape, dtype: str) -> ConfigKey:
        return config_key(shape.total, CHANNELS, spec.TORCH_DTYPES[dtype])

    def part_of(self, key: ConfigKey) -> str:
        return "vision"

    def heuristic(self, shape: spec.TuningShape, dtype: str, arch: Arch) -> Config:
        return heuristic()

    def candidates(self, shape: spec.TuningShape, arch: Arch, heuristic: Config) -> list[Config]:
        tiles = [(1, 128, 1), (2, 128, 1), (2, 128, 2), (4, 128, 4), (8, 128, 4), (4, 64, 1), (8, 64, 2)]
        return [{"BLOCK_M": m, "BLOCK_K": k, "num_warps": warps} for m, k, warps in tiles]

    def tuning_problem(
        self, shape: spec.TuningShape, dtype: str, device: torch.device, reference: ModuleType
    ) -> spec.TuningProblem:
        normal = spec.random_inputs(dtype, device)
        features = normal(shape.total * PATCHES, CHANNELS)
        weight, bias, rows = 1 + 0.1 * normal(CHANNELS), normal(CHANNELS), spec.first_and_last(shape.total, device)

        def expect(dtype: torch.dtype) -> tuple[Tensor, ...]:
            patches = features.view(shape.total, PATCHES, CHANNELS)[rows].to(dtype)
            return (F.layer_norm(patches, (CHANNELS,), weight.to(dtype), bias.to(dtype)).flatten(1),)

        return spec.TuningProblem(lambda config: (patch_merge_norm(features, None, weight, bias, config=config),), expect, rows)

    def variants(self, part: str, dtype: str, arch: Arch, config: Config) -> list[spec.CompileVariant]:
        return [
            _variant(edition, norm_width, gathered, dtype, config)
            for edition, norm_width in (("preview", CHANNELS), ("1.5", MERGED_WIDTH))
            for gathered in (False, True)
        ]

    def shipped_variants(self, arch: Arch) -> list[spec.CompileVariant]:
        return [variant for dtype in spec.TORCH_DTYPES for variant in self.variants("vision", dtype, arch, heuristic())]

    def counted_cases(self, vision_batch: spec.BuildBatch) -> list[spec.CountedCase]:
        half, width = torch.float16, PATCHES * COUNTED_CHANNELS
        batch = vision_batch(torch.tensor([[1, 4, COUNTED_ROWS // 16]] * 16))
        shapes = {
            "norm_weight": (COUNTED_CHANNELS,), "norm_bias": (COUNTED_CHANNELS,),
            "linear_1_weight": (width, width), "linear_1_bias": (width,),
            "linear_2_weight": (COUNTED_OUT, width), "linear_2_bias": (COUNTED_OUT,),
        }  # fmt: skip
        weights = {name: torch.randn(shape, dtype=half) * shape[-1] ** -0.5 for name, shape in shapes.items()}
        features = torch.randn(PATCHES * COUNTED_ROWS, COUNTED_CHANNELS, dtype=half)
        name, label = "patch_merge_projection", f"16 images, widths {width} and {COUNTED_OUT} (with intermediates)"
        arguments, inputs = {"features": features, "grid_thw": batch, **weights}, [features, *weights.values()]
        limits, flops = {"launches": 3, "unique": 1.05, "idle": 0}, 2 * COUNTED_ROWS * width * (width + COUNTED_OUT)
        # The normalized merged rows and the hidden activation are written and read
        intermediates = 2 * 2 * COUNTED_ROWS * width * half.itemsize
        return [spec.CountedCase(name, f"{name}, {label}", name, arguments, inputs, limits, flops, intermediates)]


def _variant(edition: str, norm_width: int, gathered: bool, dtype: str, config: Config) -> spec.CompileVariant:
    pointers = ("merged_ptr", "features_ptr", "norm_weight_ptr", "norm_bias_ptr")
    signature = {
        **dict.fromkeys(pointers, f"*{dtype}:16"),
        **{"merge_index_ptr": "*i32:16" if gathered else None, "num_rows": "i32", "eps": "fp32"},
        **{"PATCHES": PATCHES, "CHANNELS": CHANNELS, "STRIDE": CHANNELS, "NORM_WIDTH": norm_width},
        **{"BLOCK_M": config["BLOCK_M"], "BLOCK_K": config["BLOCK_K"]},
    }
    label = f"{edition} {'raster' if gathered else 'block'} {dtype}"
    in_forward = label == "preview block bf16"
    return spec.CompileVariant(patch_merge_norm_kernel, label, signature, config["num_warps"], 3, False, in_forward)


SPEC = PatchMergeNormSpec()
