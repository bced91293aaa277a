"""The verify cases of patch_merge_projection: the kernels patch_merge_norm and linear."""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import FP32_ROUNDOFF, SIGMAS, Arguments, RunReference, Truth, VerifyCase, round_once, unit_roundoff

PATCHES, CHANNELS = 4, 1152
MERGED_WIDTH, OUT_WIDTH = PATCHES * CHANNELS, 4096
MAX_GELU_SLOPE = 1.13


def verify_cases(real_sizes: bool, reference: RunReference) -> list[VerifyCase]:
    grids, few = [(1, 4, 6), (2, 2, 4)], [(1, 2, 2), (1, 4, 2)]
    channels, hidden, out = 48, 80, 72
    if real_sizes:
        grids, few = [(1, 24, 26), (3, 16, 18), (1, 34, 24), (1, 2, 2)], [(1, 16, 20), (2, 12, 10), (1, 2, 2)]
        channels, hidden, out = CHANNELS, MERGED_WIDTH, OUT_WIDTH
    return [
        _verify_case(f"norm {when} merge{rows}", grid, channels, hidden, out, norm_width)
        for grid, rows in ((few, ", few rows"), (grids, ""))
        for when, norm_width in (("before", channels), ("after", PATCHES * channels))
    ]


def _verify_case(
    label: str, grids: list[tuple[int, int, int]], channels: int, hidden: int, out: int, norm_width: int
) -> VerifyCase:
    patches, width = sum(map(prod, grids)), PATCHES * channels

    def draw(generator: torch.Generator) -> Arguments:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        return {
            "features": 0.5 + normal(patches, channels),
            "grid_thw": torch.tensor(grids),
            "norm_weight": 1 + 0.3 * normal(norm_width),
            "norm_bias": 0.3 * normal(norm_width),
            "linear_1_weight": normal(hidden, width) * width**-0.5,
            "linear_1_bias": 0.3 * normal(hidden),
            "linear_2_weight": normal(out, hidden) * hidden**-0.5,
            "linear_2_bias": 0.3 * normal(out),
        }

    return VerifyCase("patch_merge_projection", f"{label}, T {patches} x {channels}", draw, _truth)


def _truth(arguments: Arguments, dtype: torch.dtype) -> Truth:
    """The projector in float64. Rounded are the normalized row, the input of the GELU (some backends), its output, and the
    output; each rounding passes through the following matmuls as a variance."""
    x, u = arguments["features"], unit_roundoff(dtype)
    weight, bias = arguments["norm_weight"], arguments["norm_bias"]
    if len(weight) == x.shape[1]:
        merged = _merge(F.layer_norm(x, weight.shape, weight, bias), arguments["grid_thw"])
    else:
        merged = F.layer_norm(_merge(x, arguments["grid_thw"]), weight.shape, weight, bias)
    weight_1, weight_2 = arguments["linear_1_weight"], arguments["linear_2_weight"]
    before = F.linear(merged, weight_1, arguments["linear_1_bias"])
    hidden = F.gelu(before)
    out = F.linear(hidden, weight_2, arguments["linear_2_bias"])

    norm_variance = (u + 8 * FP32_ROUNDOFF) ** 2 + FP32_ROUNDOFF**2 * merged.shape[1]
    variance = norm_variance * F.linear(merged.square(), weight_1.square())
    variance += ((u + 4 * FP32_ROUNDOFF) * before).square()
    variance = MAX_GELU_SLOPE**2 * variance + (u * hidden).square()
    variance = F.linear(variance, weight_2.square())
    variance += FP32_ROUNDOFF**2 * hidden.shape[1] * F.linear(hidden.square(), weight_2.square())
    return [(out, round_once(out, dtype) + SIGMAS * variance.sqrt())]


def _merge(x: Tensor, grid_thw: Tensor) -> Tensor:
    """[T/4, 4C]: the 2x2 blocks of features [T, C] in raster order, image by image."""
    merged = []
    for (t, h, w), image in zip(grid_thw.tolist(), x.split(grid_thw.prod(1).tolist()), strict=True):
        blocks = image.view(t, h // 2, 2, w // 2, 2, -1).transpose(2, 3)
        merged.append(blocks.reshape(t * h * w // 4, -1))
    return torch.cat(merged)
