"""Linear layer with bias and optional exact GELU in the epilogue. Symbols: M rows, IN and OUT features."""

import logging

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .device import Arch, device_arch
from .launch import Kernel
from .launch_config import Config, ConfigKey, cache_config, cdiv, dtype_name, launch_config, log_once, next_power_of_2
from .tma import make_descriptors

MIN_BLOCK_K = 16  # the smallest K of tl.dot
GROUP_M = 8


@triton.jit
def _store_rows(out_ptr, x, o_m, o_n, num_rows, OUT: tl.constexpr):
    p_out = out_ptr + o_m.to(tl.int64)[:, None] * OUT + o_n[None, :]
    tl.store(p_out, x.to(out_ptr.dtype.element_ty), mask=(o_m < num_rows)[:, None] & (o_n < OUT)[None, :])


@triton.jit
def _load_bias(bias_ptr, o_n, OUT: tl.constexpr):
    return tl.load(bias_ptr + o_n, mask=o_n < OUT, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit(do_not_specialize=["num_rows"])
def linear_kernel(
    out_ptr, x_ptr, weight_ptr, x_desc, weight_desc, bias_ptr, num_rows,
    IN: tl.constexpr, OUT: tl.constexpr, GELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows by BLOCK_N columns of x [num_rows, IN] @ weight [OUT, IN].T + bias [OUT], or its GELU."""
    # GROUP_M row blocks share their column blocks of the weight in L2.
    num_m, num_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(OUT, BLOCK_N)
    first_m = tl.program_id(0) // (GROUP_M * num_n) * GROUP_M
    group = tl.minimum(num_m - first_m, GROUP_M)
    place = tl.program_id(0) % (GROUP_M * num_n)
    first_row, first_column = (first_m + place % group) * BLOCK_M, place // group * BLOCK_N
    o_m, o_n = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)

    # Rows and columns past the edge repeat the last one, so that the loop needs no mask for them; they are not stored.
    p_x = x_ptr + tl.minimum(o_m, num_rows - 1).to(tl.int64)[:, None] * IN + o_k[None, :]
    p_weight = weight_ptr + (tl.minimum(o_n, OUT - 1)[:, None] * IN + o_k[None, :])
    b_out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if not GELU:
        b_out += _load_bias(bias_ptr, o_n, OUT)
    for k in range(0, IN, BLOCK_K):
        if x_desc is not None:
            b_x, b_weight = x_desc.load([first_row, k]), weight_desc.load([first_column, k])
        elif IN % BLOCK_K == 0:
            b_x, b_weight = tl.load(p_x + k), tl.load(p_weight + k)
        else:
            m_k = (k + o_k < IN)[None, :]
            b_x, b_weight = tl.load(p_x + k, mask=m_k, other=0.0), tl.load(p_weight + k, mask=m_k, other=0.0)
        b_out = tl.dot(b_x, b_weight.to(b_x.dtype).T, b_out, input_precision="ieee")

    if GELU:
        # Half of the columns at a time: erf of the whole tile spills registers.
        HALF: tl.constexpr = BLOCK_N // 2
        b_left, b_right = b_out.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        o_left = first_column + tl.arange(0, HALF)
        o_right = o_left + HALF
        _store_rows(out_ptr, _gelu(b_left + _load_bias(bias_ptr, o_left, OUT)), o_m, o_left, num_rows, OUT)
        _store_rows(out_ptr, _gelu(b_right + _load_bias(bias_ptr, o_right, OUT)), o_m, o_right, num_rows, OUT)
    else:
        _store_rows(out_ptr, b_out, o_m, o_n, num_rows, OUT)


_kernel = Kernel(linear_kernel)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor, gelu: bool = False, backend: str = "auto", config: Config | None = None
) -> Tensor:
    """x [M, IN] @ weight [OUT, IN].T + bias [OUT], with `gelu` followed by the exact GELU; all tensors contiguous.

    `backend` is "triton" (the kernel here), "torch" (cuBLAS or hipBLAS), or "auto": as the launch config says.
    """
    (rows, width), columns = x.shape, weight.shape[0]
    if config is None:
        config = _config(x.device, x.dtype, rows, columns, gelu)
    if backend == "auto":
        backend = str(config["backend"])
        log_once(f"matmuls of patch_merge_projection on {x.device.type} run in {backend}", logging.INFO)
    if backend == "torch":
        out = F.linear(x, weight.to(x.dtype), bias.to(x.dtype))
        return torch.ops.aten.gelu_(out) if gelu else out
    out, options = x.new_empty(rows, columns), launch_options(config, width)
    x_block, weight_block = ([options[name], options["BLOCK_K"]] for name in ("BLOCK_M", "BLOCK_N"))
    descriptors = make_descriptors(config, (x, x_block), (weight, weight_block))
    _kernel(
        x.device, cdiv(rows, options["BLOCK_M"]) * cdiv(columns, options["BLOCK_N"]),
        out, x, weight, *descriptors, bias, rows, IN=width, OUT=columns, GELU=gelu, GROUP_M=GROUP_M, **options,
    )  # fmt: skip
    return out


def launch_options(config: Config, width: int) -> Config:
    """The options of a launch. BLOCK_K becomes the largest power of two that divides `width`, so that K needs no mask."""
    options = {name: config[name] for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")}
    divisor = width & -width
    return {**options, "BLOCK_K": config["BLOCK_K"] if divisor < MIN_BLOCK_K else min(config["BLOCK_K"], divisor)}


def heuristic(arch: Arch, rows: int, columns: int, dtype: torch.dtype) -> Config:
    """The launch config where no table has an entry. The backend is torch: on an H200, cuBLAS was faster at every timed size.

    A full tile is 128 x 256, the largest whose accumulator fits the registers. Smaller tiles are used where it would give
    fewer than two waves of programs.
    """
    if dtype == torch.float32:
        return _config_of(64, 256, 32, 8, 2)
    if not arch.is_nvidia:
        return _config_of(128, 128, 32, 8, 2)
    for block_m, block_n in ((128, 256), (64, 128), (64, 64)):
        waves = cdiv(rows, block_m) * cdiv(columns, block_n) / arch.num_multiprocessors
        if waves >= (2 if block_m == 128 else 0.75):
            break
    # wgmma and tcgen05 read operands from shared memory. mma.sync holds them in registers, and consumer GPUs have 100 KB.
    block_k, num_stages = (64, 3) if arch.capability in (90, 100, 103) else (32, 4)
    return _config_of(block_m, block_n, block_k, block_m // 16, num_stages)


def _config_of(block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int) -> Config:
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    return {**sizes, "num_warps": num_warps, "num_stages": num_stages, "use_tma": False, "backend": "torch"}


def config_key(rows: int, columns: int, dtype: torch.dtype, gelu: bool) -> ConfigKey:
    """The key of the tables; rows are rounded up to a power of two."""
    epilogue = "gelu" if gelu else "none"
    return {"rows": next_power_of_2(rows), "columns": columns, "dtype": dtype_name(dtype), "epilogue": epilogue}


@cache_config
def _config(device: torch.device, dtype: torch.dtype, rows: int, columns: int, gelu: bool) -> Config:
    key = config_key(rows, columns, dtype, gelu)
    return launch_config("linear", device, key, heuristic(device_arch(device), rows, columns, dtype))
