"""A linear layer in one launch, and the tile sizes of every product of packed rows with a weight matrix."""

from functools import cache
from itertools import product

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .descriptors import describe, describe_types, loads_of
from .launch import Kernel
from .spec import CompileSpec
from .tiles import Config, cdiv, dtype_name, next_power_of_2, remember, tile

# Numbers of rows that between them get every tile of `matmul_tile`: (dtype, Triton's name of it, rows).
SHIPPED_ROWS = [(torch.float32, "fp32", 4096)] + [(torch.bfloat16, "bf16", rows) for rows in (64, 256, 1024, 4096)]


@triton.jit
def store_rows(out_ptr, x, o_m, o_n, num_rows, OUT: tl.constexpr):
    p_out = out_ptr + o_m.to(tl.int64)[:, None] * OUT + o_n[None, :]
    tl.store(p_out, x.to(out_ptr.dtype.element_ty), mask=(o_m < num_rows)[:, None] & (o_n < OUT)[None, :])


@triton.jit
def store_gelu(out_ptr, bias_ptr, x, o_m, first_column, num_rows, OUT: tl.constexpr):
    """Stores gelu(x + bias) of a tile, exact and by halves: the whole tile at once spills."""
    HALF: tl.constexpr = x.shape[1] // 2
    b_left, b_right = x.reshape(x.shape[0], 2, HALF).permute(0, 2, 1).split()
    o_half = first_column + tl.arange(0, HALF)
    store_rows(out_ptr, _gelu(b_left, bias_ptr, o_half, OUT), o_m, o_half, num_rows, OUT)
    store_rows(out_ptr, _gelu(b_right, bias_ptr, o_half + HALF, OUT), o_m, o_half + HALF, num_rows, OUT)


@triton.jit
def _gelu(x, bias_ptr, o_n, OUT: tl.constexpr):
    x += _load_bias(bias_ptr, o_n, OUT)
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _load_bias(bias_ptr, o_n, OUT: tl.constexpr):
    return tl.load(bias_ptr + o_n, mask=o_n < OUT, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["num_rows"])
def linear_kernel(
    out_ptr, x_ptr, weight_ptr, x_desc, weight_desc, bias_ptr, num_rows,
    IN: tl.constexpr, OUT: tl.constexpr, GELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M rows by BLOCK_N columns of x [num_rows, IN] @ weight [OUT, IN].T + bias [OUT], or its GELU."""
    # GROUP_M row tiles go through the columns together, so that what they share stays in L2.
    num_m, num_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(OUT, BLOCK_N)
    first_m = tl.program_id(0) // (GROUP_M * num_n) * GROUP_M
    group = tl.minimum(num_m - first_m, GROUP_M)
    place = tl.program_id(0) % (GROUP_M * num_n)
    first_row, first_column = (first_m + place % group) * BLOCK_M, place // group * BLOCK_N
    o_m, o_n = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)

    # Tiles at an edge read the last row again instead of masking: nothing of it is stored.
    p_x = x_ptr + tl.minimum(o_m, num_rows - 1).to(tl.int64)[:, None] * IN + o_k[None, :]
    o_weight = tl.minimum(o_n, OUT - 1)[:, None] * IN + o_k[None, :]
    b_out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if not GELU:
        b_out += _load_bias(bias_ptr, o_n, OUT)
    for k in range(0, IN, BLOCK_K):
        b_x = tl.load(p_x + k) if x_desc is None else x_desc.load([first_row, k])
        b_weight = tl.load(weight_ptr + (o_weight + k)) if weight_desc is None else weight_desc.load([first_column, k])
        b_out = tl.dot(b_x, b_weight.to(b_x.dtype).T, b_out, input_precision="ieee")

    if GELU:
        store_gelu(out_ptr, bias_ptr, b_out, o_m, first_column, num_rows, OUT)
    else:
        store_rows(out_ptr, b_out, o_m, o_n, num_rows, OUT)


_launch = Kernel(linear_kernel)


def linear(x: Tensor, weight: Tensor, bias: Tensor, config: Config | None = None, gelu: bool = False) -> Tensor:
    """x [M, IN] @ weight [OUT, IN].T + bias [OUT], or with `gelu` its exact GELU; all contiguous, IN a multiple of 16.

    `config` is the tile; None: the table's or the heuristic's. Where its path is "cublas" torch computes, for any IN.
    """
    (rows, width), columns = x.shape, weight.shape[0]
    if config is None:
        config = _config(x.device, x.dtype, rows, columns)
    if config["path"] == "cublas":
        out = F.linear(x, weight.to(x.dtype), bias.to(x.dtype))
        return F.gelu(out) if gelu else out
    out, options = x.new_empty(rows, columns), launch_options(config, width)
    x_block, weight_block = ([options[name], options["BLOCK_K"]] for name in ("BLOCK_M", "BLOCK_N"))
    fetched = describe(config, (x, x_block), (weight, weight_block))
    with torch.cuda.device_of(x):
        _launch(
            cdiv(rows, options["BLOCK_M"]) * cdiv(columns, options["BLOCK_N"]),
            out, x, weight, *fetched, bias, rows, IN=width, OUT=columns, GELU=gelu, GROUP_M=8, **options,
        )  # fmt: skip
    return out


@remember
def _config(device: torch.device, dtype: torch.dtype, rows: int, columns: int) -> Config:
    heuristic = matmul_tile(*multiprocessors(device), rows, columns, dtype)
    return tile("linear", device, tile_key(rows, dtype, columns=columns), heuristic)


def matmul_tile(arch: int, processors: int, rows: int, columns: int, dtype: torch.dtype) -> Config:
    """The tile of a [rows, K] by [K, columns] product where no table has one.

    Full tiles are 128 x 256, the widest whose sums stay in registers: rows normalised on their way in then serve the most
    columns. Smaller ones serve where these would make fewer than two waves of programs.
    `arch` is a CUDA capability (90 for 9.0), or 0 for AMD.
    """
    if dtype == torch.float32:
        return _tile(64, 256, 32, 8, 2)
    if arch == 0:
        return _tile(128, 128, 32, 8, 2)
    for block_m, block_n in ((128, 256), (64, 128), (64, 64)):
        if cdiv(rows, block_m) * cdiv(columns, block_n) >= processors * (2 if block_m == 128 else 0.75):
            break
    # wgmma and tcgen05 read shared memory; mma.sync wants registers, and consumer chips have 100 KB of shared memory.
    block_k, num_stages = (64, 3) if arch in (90, 100, 103) else (32, 4)
    return _tile(block_m, block_n, block_k, block_m // 16, num_stages)


def _tile(block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int) -> Config:
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    # Descriptors and torch's product where a table says so: only a clock tells them apart
    return {**sizes, "num_warps": num_warps, "num_stages": num_stages, "loads": "pointers", "path": "triton"}


def tile_key(rows: int, dtype: torch.dtype, **sizes: int | str) -> dict[str, int | str]:
    """What a table is asked for; rows go by powers of two."""
    return {"rows": next_power_of_2(rows), "dtype": dtype_name(dtype), **sizes}


def launch_options(config: Config, width: int) -> Config:
    """What a launch takes of a tile. Its K step is cut to a power of two that divides `width`: K then needs no mask."""
    options = {name: config[name] for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")}
    return {**options, "BLOCK_K": min(config["BLOCK_K"], width & -width)}


@cache
def multiprocessors(device: torch.device) -> tuple[int, int]:
    """(capability, number of multiprocessors); capability 0 is AMD, and the interpreter counts as an A100."""
    if device.type != "cuda":
        return 80, 108
    properties = torch.cuda.get_device_properties(device)
    return 0 if torch.version.hip else 10 * properties.major + properties.minor, properties.multi_processor_count


def compile_spec(dtype: str, config: Config, gelu: bool = False) -> CompileSpec:
    """The projector's second product, 4608 to 4096, in a tile, or its first with GELU; `dtype` is Triton's name."""
    x_block, weight_block = ([config[name], config["BLOCK_K"]] for name in ("BLOCK_M", "BLOCK_N"))
    signature = {
        **dict.fromkeys(("out_ptr", "x_ptr", "weight_ptr", "bias_ptr"), f"*{dtype}:16"),
        **dict(zip(("x_desc", "weight_desc"), describe_types(config, dtype, x_block, weight_block), strict=True)),
        **{"num_rows": "i32", "IN": 4608, "OUT": 4608 if gelu else 4096, "GELU": gelu, "GROUP_M": 8},
        **{key: config[key] for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K")},
    }
    label = f"{dtype}-{config['BLOCK_M']}x{config['BLOCK_N']}"
    if gelu:
        label += " gelu"
    if config["loads"] == "descriptors":
        label += " descriptors"
    return CompileSpec(linear_kernel, label, signature, config["num_warps"], config["num_stages"], dtype != "fp32")


def compile_specs(arch: int | str) -> list[CompileSpec]:
    """The variants that ship for a target."""
    specs = {}
    for dtype, name, rows in SHIPPED_ROWS:
        config = matmul_tile(0 if isinstance(arch, str) else arch, 132, rows, 4096, dtype)
        for loads, gelu in product(loads_of(arch), (False, True)) if name == "bf16" else [("pointers", False)]:
            spec = compile_spec(name, config | {"loads": loads}, gelu)
            specs[spec.label] = spec
    return list(specs.values())
