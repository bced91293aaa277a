"""LayerNorm of patches on their way into the 2x2 merge: the parts that a product calls, and a pass of its own."""

import triton
import triton.language as tl


@triton.jit
def load_features(
    features_ptr, merge_index_ptr, o_row, k, o_k, PATCHES: tl.constexpr, CHANNELS: tl.constexpr, STRIDE: tl.constexpr
):  # fmt: skip
    """Columns k + o_k of the merged rows o_row; they never cross from one patch into the next."""
    o_patch = o_row * PATCHES + k // CHANNELS
    if merge_index_ptr is not None:
        o_patch = tl.load(merge_index_ptr + o_patch)
    return tl.load(features_ptr + o_patch.to(tl.int64)[:, None] * STRIDE + (k % CHANNELS + o_k)[None, :])


@triton.jit
def row_statistics(
    features_ptr, merge_index_ptr, o_row, first_k, eps,
    PATCHES: tl.constexpr, CHANNELS: tl.constexpr, STRIDE: tl.constexpr, NORM_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / deviation of NORM_WIDTH columns from first_k on, in one pass over the merged rows o_row."""
    STEPS: tl.constexpr = NORM_WIDTH // BLOCK_K
    o_k = tl.arange(0, BLOCK_K)
    # Welford's update in each of BLOCK_K lanes: a sum of squares is wrong for rows whose mean is large.
    lane_mean = tl.zeros([o_row.shape[0], BLOCK_K], tl.float32)
    square = tl.zeros([o_row.shape[0], BLOCK_K], tl.float32)
    for i in tl.range(0, STEPS, num_stages=3):
        k = first_k + i * BLOCK_K
        b_x = load_features(features_ptr, merge_index_ptr, o_row, k, o_k, PATCHES, CHANNELS, STRIDE).to(tl.float32)
        delta = b_x - lane_mean
        lane_mean += delta * (1.0 / (i + 1))
        square += delta * (b_x - lane_mean)
    mean = tl.sum(lane_mean, 1) / BLOCK_K
    delta = lane_mean - mean[:, None]
    variance = tl.sum(square + delta * delta * STEPS, 1) / NORM_WIDTH
    return mean, tl.rsqrt(variance + eps)


@triton.jit
def normalise(b_x, mean, rstd, norm_weight_ptr, norm_bias_ptr, o_norm):
    b_weight = tl.load(norm_weight_ptr + o_norm).to(tl.float32)
    b_bias = tl.load(norm_bias_ptr + o_norm).to(tl.float32)
    b_normed = (b_x.to(tl.float32) - mean[:, None]) * rstd[:, None] * b_weight[None, :] + b_bias[None, :]
    return b_normed.to(b_x.dtype)


@triton.jit(do_not_specialize=["num_rows"])
def patch_merge_norm_kernel(
    merged_ptr, mean_ptr, rstd_ptr, features_ptr, norm_weight_ptr, norm_bias_ptr, merge_index_ptr, num_rows, eps,
    PATCHES: tl.constexpr, CHANNELS: tl.constexpr, STRIDE: tl.constexpr, NORM_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK_M merged rows normalised, or their statistics where merged_ptr is None."""
    o_row = tl.minimum(tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), num_rows - 1)
    o_k = tl.arange(0, BLOCK_K)
    PARTS: tl.constexpr = PATCHES * CHANNELS // NORM_WIDTH
    for part in range(0, PARTS):
        mean, rstd = row_statistics(features_ptr, merge_index_ptr, o_row, part * NORM_WIDTH, eps,
                                    PATCHES, CHANNELS, STRIDE, NORM_WIDTH, BLOCK_K)  # fmt: skip
        if merged_ptr is None:
            tl.store(mean_ptr + o_row * PARTS + part, mean)
            tl.store(rstd_ptr + o_row * PARTS + part, rstd)
        else:
            for i in range(0, NORM_WIDTH, BLOCK_K):
                k = part * NORM_WIDTH + i
                b_x = load_features(features_ptr, merge_index_ptr, o_row, k, o_k, PATCHES, CHANNELS, STRIDE)
                b_normed = normalise(b_x, mean, rstd, norm_weight_ptr, norm_bias_ptr, i + o_k)
                p_merged = merged_ptr + o_row.to(tl.int64)[:, None] * (PATCHES * CHANNELS) + (k + o_k)[None, :]
                tl.store(p_merged, b_normed)
