"""The projector: LayerNorm, 2x2 patch merge and linear 1 with GELU in one launch, linear 2 in another.

The normalised, merged features exist in registers only: the fewest bytes. Timed tables may say otherwise: of path "merged",
they are written once, for a plain product with GELU at its end; of "cublas", torch takes both products from there.
T patches of C channels; merge_size² patches make a merged row.
"""

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from .descriptors import describe, describe_types
from .launch import Kernel
from .matmul import SHIPPED_ROWS, launch_options, linear, matmul_tile, multiprocessors, store_gelu, tile_key
from .patch_merge_norm import load_features, normalise, patch_merge_norm_kernel, row_statistics
from .spec import TRITON_VERSION, CompileSpec
from .tiles import Config, cdiv, tile

NORM_BLOCK_M, NORM_BLOCK_K, NORM_WARPS = 4, 128, 2
STATISTICS_BLOCK_K = 64
# An index read before the features takes stages of the pipeline. AMD's shared memory has no room for more.
INDEX_STAGES = 2


@triton.jit(do_not_specialize=["num_rows", "tiles_per_program"])
def patch_merge_linear_kernel(
    hidden_ptr, mean_ptr, rstd_ptr, features_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, weight_desc, bias_ptr,
    merge_index_ptr, num_rows, tiles_per_program, eps,
    PATCHES: tl.constexpr, CHANNELS: tl.constexpr, STRIDE: tl.constexpr, NORM_WIDTH: tl.constexpr, HIDDEN: tl.constexpr,
    STATISTICS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program computes gelu(linear_1(merge(norm(x)))) of BLOCK_M merged rows and tiles_per_program column tiles."""
    NUM_N: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    WIDTH: tl.constexpr = PATCHES * CHANNELS
    PARTS: tl.constexpr = WIDTH // NORM_WIDTH
    num_groups = tl.cdiv(NUM_N, tiles_per_program)
    block_m = tl.program_id(0) // num_groups
    if STATISTICS:
        # Through memory, not registers: the sums need those. Programs of the same rows store the same numbers.
        o_row = tl.minimum(block_m * BLOCK_M + tl.arange(0, BLOCK_M), num_rows - 1)
        for part in range(0, PARTS):
            mean, rstd = row_statistics(features_ptr, merge_index_ptr, o_row, part * NORM_WIDTH, eps,
                                        PATCHES, CHANNELS, STRIDE, NORM_WIDTH, BLOCK_S)  # fmt: skip
            tl.store(mean_ptr + o_row * PARTS + part, mean)
            tl.store(rstd_ptr + o_row * PARTS + part, rstd)
        tl.debug_barrier()

    o_k = tl.arange(0, BLOCK_K)
    first = block_m * NUM_N + tl.program_id(0) % num_groups * tiles_per_program
    for tile_id in range(first, tl.minimum(first + tiles_per_program, (block_m + 1) * NUM_N)):
        # Rows past the last repeat it, and columns likewise: no mask in the loop, and nothing of them is stored.
        o_m = tile_id // NUM_N * BLOCK_M + tl.arange(0, BLOCK_M)
        o_row = tl.minimum(o_m, num_rows - 1)
        first_n = tile_id % NUM_N * BLOCK_N
        o_n = first_n + tl.arange(0, BLOCK_N)
        o_weight = tl.minimum(o_n, HIDDEN - 1)[:, None] * WIDTH + o_k[None, :]
        b_hidden = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, WIDTH, BLOCK_K):
            b_x = load_features(features_ptr, merge_index_ptr, o_row, k, o_k, PATCHES, CHANNELS, STRIDE)
            mean = tl.load(mean_ptr + o_row * PARTS + k // NORM_WIDTH)
            rstd = tl.load(rstd_ptr + o_row * PARTS + k // NORM_WIDTH)
            b_normed = normalise(b_x, mean, rstd, norm_weight_ptr, norm_bias_ptr, k % NORM_WIDTH + o_k)
            b_weight = tl.load(weight_ptr + (o_weight + k)) if weight_desc is None else weight_desc.load([first_n, k])
            b_hidden = tl.dot(b_normed, b_weight.to(b_x.dtype).T, b_hidden, input_precision="ieee")
        store_gelu(hidden_ptr, bias_ptr, b_hidden, o_m, first_n, num_rows, HIDDEN)


_launch_norm, _launch_linear = Kernel(patch_merge_norm_kernel), Kernel(patch_merge_linear_kernel)


def patch_merge_projection(
    features: Tensor,
    merge_index: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    linear_1_weight: Tensor,
    linear_1_bias: Tensor,
    linear_2_weight: Tensor,
    linear_2_bias: Tensor,
    merge_size: int = 2,
    eps: float = 1e-5,
    config: Config | None = None,
) -> Tensor:
    """linear_2(gelu(linear_1(merged))); arguments and result as in the reference.

    Weights are contiguous, of any floating dtype; they are rounded to the features' on their way into the products.
    The products here need channels in multiples of 16; others go to torch, as all do where a table says "cublas".
    `config` is the tile of the first product; None: the table's or the heuristic's.
    """
    patches, channels, norm_width = merge_size**2, features.shape[1], norm_weight.shape[0]
    rows, hidden_width, out_width = features.shape[0] // patches, linear_1_weight.shape[0], linear_2_weight.shape[0]
    if rows == 0:
        return features.new_empty(0, out_width)
    config = config or _config(features, rows, hidden_width, out_width, merge_index is not None)
    if channels % 16 or hidden_width % 16:
        config = {"path": "cublas"}
    sizes = {"PATCHES": patches, "CHANNELS": channels, "STRIDE": features.stride(0), "NORM_WIDTH": norm_width}
    mean, rstd = (features.new_empty(features.numel() // norm_width, dtype=torch.float32) for _ in range(2))

    def launch_norm(merged: Tensor | None) -> None:
        _launch_norm(
            cdiv(rows, NORM_BLOCK_M),
            merged, mean, rstd, features, norm_weight, norm_bias, merge_index, rows, eps, **sizes,
            BLOCK_M=NORM_BLOCK_M, BLOCK_K=min(NORM_BLOCK_K, channels & -channels), num_warps=NORM_WARPS,
        )  # fmt: skip

    with torch.cuda.device_of(features):
        if config["path"] != "triton":
            launch_norm(merged := features.new_empty(rows, patches * channels))
            hidden = linear(merged, linear_1_weight, linear_1_bias, config, gelu=True)
            return linear(hidden, linear_2_weight, linear_2_bias, config if config["path"] == "cublas" else None)

        if config["statistics"] == "separate":
            launch_norm(None)
        hidden = features.new_empty(rows, hidden_width)
        tiles_n = cdiv(hidden_width, config["BLOCK_N"])
        per_program = config.get("tiles_per_program") or tiles_per_program(features.device, config, rows, hidden_width)
        options = launch_options(config, channels)
        fetched = describe(config, (linear_1_weight, [options["BLOCK_N"], options["BLOCK_K"]]))
        _launch_linear(
            cdiv(rows, config["BLOCK_M"]) * cdiv(tiles_n, per_program),
            hidden, mean, rstd, features, norm_weight, norm_bias, linear_1_weight, *fetched, linear_1_bias,
            merge_index, rows, per_program, eps, **sizes, HIDDEN=hidden_width,
            STATISTICS=config["statistics"] == "fused", BLOCK_S=min(STATISTICS_BLOCK_K, channels & -channels),
            **options,
        )  # fmt: skip
    return linear(hidden, linear_2_weight, linear_2_bias)


def heuristic(
    arch: int,
    processors: int,
    rows: int,
    dtype: torch.dtype,
    width: int,
    hidden_width: int,
    out_width: int,
    gathered: bool,
) -> Config:
    """The tile, and who takes the statistics, where no table says.

    A launch of their own reads the features once more from memory. Taken by the programs of the product, each reads its
    rows once more from L2, for as many column tiles as it then computes. The former is for few rows, which leave a
    program one column tile to spread that over, and only where the weights outweigh the features 32 times. AMD always
    takes it: a barrier there orders shared memory only, and the programs' statistics go through global memory.

    On sm_90 torch's products serve in half precision: for rows that are normalised on their way into wgmma an H200 took 170 us in
    place of 82 (256 rows), and 412 in place of 155 (1024). For other chips the bytes decide until a clock has spoken.
    """
    config = matmul_tile(arch, processors, rows, hidden_width, dtype)
    if config["BLOCK_M"] == 128 and TRITON_VERSION < (3, 7):
        # Those compilers spill 256 columns of sums beside the rows that they normalise
        config["BLOCK_N"] = 128
    if gathered and arch:
        config["num_stages"] += INDEX_STAGES
    separate = arch == 0 or 32 * rows * width <= hidden_width * (width + out_width)
    path = "cublas" if arch == 90 and dtype != torch.float32 else config["path"]
    return {**config, "path": path, "statistics": "separate" if separate else "fused"}


def tiles_per_program(device: torch.device, config: Config, rows: int, hidden_width: int) -> int:
    """Column tiles that share one reading of the statistics: as many as leave every multiprocessor busy at 8 warps."""
    if config["statistics"] == "separate":
        return 1
    blocks = cdiv(rows, config["BLOCK_M"]) * cdiv(hidden_width, config["BLOCK_N"])
    return cdiv(blocks, multiprocessors(device)[1] * max(1, 8 // config["num_warps"]))


def _config(features: Tensor, rows: int, hidden_width: int, out_width: int, gathered: bool) -> Config:
    channels = features.shape[1]
    width = features.shape[0] // rows * channels
    arch, processors = multiprocessors(features.device)
    key = tile_key(rows, features.dtype, channels=channels, order="raster" if gathered else "block")
    chosen = heuristic(arch, processors, rows, features.dtype, width, hidden_width, out_width, gathered)
    return tile("patch_merge", features.device, key, chosen)


def compile_spec(
    label: str, dtype: str, config: Config, norm_width: int, gathered: bool, fused_statistics: bool
) -> CompileSpec:
    """The first product, 4 x 1152 to 4608, in a tile; `dtype` is Triton's name."""
    [weight_desc] = describe_types(config, dtype, [config["BLOCK_N"], config["BLOCK_K"]])
    signature = {
        "hidden_ptr": f"*{dtype}:16", **_norm_arguments(dtype, gathered), "weight_ptr": f"*{dtype}:16",
        "weight_desc": weight_desc, "bias_ptr": f"*{dtype}:16", "tiles_per_program": "i32", "eps": "fp32",
        **_sizes(norm_width), "HIDDEN": 4608,
        "STATISTICS": fused_statistics, "BLOCK_S": STATISTICS_BLOCK_K,
        **{key: config[key] for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K")},
    }  # fmt: skip
    launch = config["num_warps"], config["num_stages"]
    return CompileSpec(patch_merge_linear_kernel, label, signature, *launch, uses_tensor_cores=dtype != "fp32")


def _norm_arguments(dtype: str, gathered: bool) -> dict[str, str | None]:
    return {
        **{"mean_ptr": "*fp32:16", "rstd_ptr": "*fp32:16", "features_ptr": f"*{dtype}:16"},
        **{"norm_weight_ptr": f"*{dtype}:16", "norm_bias_ptr": f"*{dtype}:16"},
        **{"merge_index_ptr": "*i32:16" if gathered else None, "num_rows": "i32"},
    }


def _sizes(norm_width: int) -> dict[str, int]:
    return {"PATCHES": 4, "CHANNELS": 1152, "STRIDE": 1152, "NORM_WIDTH": norm_width}


def compile_specs(arch: int | str) -> list[CompileSpec]:
    """The projector of Preview (norm of each patch) and 1.5 (norm of the merged row), in raster and in block order."""
    specs = {}
    for (generation, norm_width), gathered in product((("preview", 1152), ("1.5", 4608)), (True, False)):
        order = "raster" if gathered else "block"
        for dtype, name, rows in SHIPPED_ROWS:
            config = heuristic(0 if isinstance(arch, str) else arch, 132, rows, dtype, 4608, 4608, 4096, gathered)
            label = f"{generation}-{order}-{name}-{config['BLOCK_M']}x{config['BLOCK_N']}-{config['statistics']}"
            fused = config["statistics"] == "fused"
            specs[label] = compile_spec(label, name, config, norm_width, gathered, fused)
        for label, merged in (("statistics", None), ("norm", "*bf16:16")):
            signature = {"merged_ptr": merged, **_norm_arguments("bf16", gathered), "eps": "fp32", **_sizes(norm_width)}
            signature |= {"BLOCK_M": NORM_BLOCK_M, "BLOCK_K": NORM_BLOCK_K}
            label = f"{generation}-{order}-{label}"
            specs[label] = CompileSpec(patch_merge_norm_kernel, label, signature, NORM_WARPS, 3, False)
    return list(specs.values())
