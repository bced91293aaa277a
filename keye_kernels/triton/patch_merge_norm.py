"""LayerNorm and 2x2 patch merge in one pass. T patches of C channels; PATCHES patches make a merged row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Kernel
from .launch_config import Config, ConfigKey, cache_config, cdiv, dtype_name, launch_config, next_power_of_2


@triton.jit
def _load_features(
    features_ptr, merge_index_ptr, o_row, k, o_k, PATCHES: tl.constexpr, CHANNELS: tl.constexpr, STRIDE: tl.constexpr
):  # fmt: skip
    """Columns k + o_k of the merged rows o_row. They never cross from one patch into the next."""
    o_patch = o_row * PATCHES + k // CHANNELS
    if merge_index_ptr is not None:
        o_patch = tl.load(merge_index_ptr + o_patch)
    return tl.load(features_ptr + o_patch.to(tl.int64)[:, None] * STRIDE + (k % CHANNELS + o_k)[None, :])


@triton.jit
def _mean_and_rstd(
    features_ptr, merge_index_ptr, o_row, first_k, eps,
    PATCHES: tl.constexpr, CHANNELS: tl.constexpr, STRIDE: tl.constexpr, NORM_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / standard deviation of NORM_WIDTH columns from first_k on, for the merged rows o_row."""
    STEPS: tl.constexpr = NORM_WIDTH // BLOCK_K
    o_k = tl.arange(0, BLOCK_K)
    # Welford's update in each of BLOCK_K lanes: a sum of squares loses the variance of rows with a large mean.
    lane_mean = tl.zeros([o_row.shape[0], BLOCK_K], tl.float32)
    square = tl.zeros([o_row.shape[0], BLOCK_K], tl.float32)
    for i in tl.range(0, STEPS, num_stages=3):
        k = first_k + i * BLOCK_K
        b_x = _load_features(features_ptr, merge_index_ptr, o_row, k, o_k, PATCHES, CHANNELS, STRIDE).to(tl.float32)
        delta = b_x - lane_mean
        lane_mean += delta * (1.0 / (i + 1))
        square += delta * (b_x - lane_mean)
    mean = tl.sum(lane_mean, 1) / BLOCK_K
    delta = lane_mean - mean[:, None]
    variance = tl.sum(square + delta * delta * STEPS, 1) / NORM_WIDTH
    return mean, tl.rsqrt(variance + eps)


@triton.jit(do_not_specialize=["num_rows"])
def patch_merge_norm_kernel(
    merged_ptr, features_ptr, norm_weight_ptr, norm_bias_ptr, merge_index_ptr, num_rows, eps,
    PATCHES: tl.constexpr, CHANNELS: tl.constexpr, STRIDE: tl.constexpr, NORM_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK_M normalized merged rows. A row is normalized in parts of NORM_WIDTH columns."""
    o_row = tl.minimum(tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), num_rows - 1)
    o_k = tl.arange(0, BLOCK_K)
    PARTS: tl.constexpr = PATCHES * CHANNELS // NORM_WIDTH
    for part in range(0, PARTS):
        mean, rstd = _mean_and_rstd(features_ptr, merge_index_ptr, o_row, part * NORM_WIDTH, eps,
                                    PATCHES, CHANNELS, STRIDE, NORM_WIDTH, BLOCK_K)  # fmt: skip
        for i in range(0, NORM_WIDTH, BLOCK_K):
            k = part * NORM_WIDTH + i
            b_x = _load_features(features_ptr, merge_index_ptr, o_row, k, o_k, PATCHES, CHANNELS, STRIDE)
            b_weight = tl.load(norm_weight_ptr + i + o_k).to(tl.float32)[None, :]
            b_bias = tl.load(norm_bias_ptr + i + o_k).to(tl.float32)[None, :]
            b_normed = (b_x.to(tl.float32) - mean[:, None]) * rstd[:, None] * b_weight + b_bias
            p_merged = merged_ptr + o_row.to(tl.int64)[:, None] * (PATCHES * CHANNELS) + (k + o_k)[None, :]
            tl.store(p_merged, b_normed.to(merged_ptr.dtype.element_ty))


_kernel = Kernel(patch_merge_norm_kernel)


def patch_merge_norm(
    features: Tensor, merge_index: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, merge_size: int = 2,
    eps: float = 1e-5, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """Normalized merged rows [T/m², m² C] of features [T, C] (last axis contiguous), in the dtype of the features.

    merge_index: [T/m², m²] int32, the patches that each row joins; None where they are adjacent. The norm's weights are
    contiguous: [C] to normalize each patch, or [m² C] to normalize the merged row.
    """
    patches, channels = merge_size**2, features.shape[1]
    rows = features.shape[0] // patches
    merged = features.new_empty(rows, patches * channels)
    if config is None:
        config = _config(features.device, features.dtype, channels, rows)
    _kernel(
        features.device, cdiv(rows, config["BLOCK_M"]),
        merged, features, norm_weight, norm_bias, merge_index, rows, eps,
        PATCHES=patches, CHANNELS=channels, STRIDE=features.stride(0), NORM_WIDTH=norm_weight.shape[0],
        BLOCK_M=config["BLOCK_M"], BLOCK_K=min(config["BLOCK_K"], channels & -channels), num_warps=config["num_warps"],
    )  # fmt: skip
    return merged


def heuristic() -> Config:
    """The launch config where no table has an entry: 1152 channels are nine blocks of 128."""
    return {"BLOCK_M": 4, "BLOCK_K": 128, "num_warps": 2}


def config_key(rows: int, channels: int, dtype: torch.dtype) -> ConfigKey:
    """The key of the tables; rows are rounded up to a power of two."""
    return {"rows": next_power_of_2(rows), "channels": channels, "dtype": dtype_name(dtype)}


@cache_config
def _config(device: torch.device, dtype: torch.dtype, channels: int, rows: int) -> Config:
    return launch_config("patch_merge_norm", device, config_key(rows, channels, dtype), heuristic())
