"""Linear layer of at most 16 rows, whose time is that of reading the weight. Symbols: T rows, IN and OUT features."""

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .device import Arch, device_arch
from .launch import Kernel
from .launch_config import Config, ConfigKey, cache_config, cdiv, dtype_name, launch_config, log_once, next_power_of_2
from .linear_few_rows_kernel import linear_few_rows_kernel
from .silu_mul import silu_mul as silu_mul_kernel
from .spec import TRITON_VERSION

LinearCall = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]  # x, weight, bias, residual

MAX_MULTIPLY_ADD_ROWS = 4  # in 16 bit; eight rows of multiply-adds would take half of an H100's instructions
MIN_DOT_SIZE = 16
LOAD_BYTES = 16  # of one thread
# Columns of a program, by rows: each thread then holds at most 64 sums in float32
COLUMNS = {1: 4, 2: 4, 4: 2, 8: 1, 16: 1}

_kernel = Kernel(linear_few_rows_kernel)


def prepare(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, silu_mul: bool, backend: str = "auto",
    config: Config | None = None,
) -> LinearCall:  # fmt: skip
    """A function that computes tensors with the metadata of these, which are not read.

    `backend` is "triton" (the kernel), "torch" (cuBLAS or hipBLAS), or "auto": as the launch config says.
    """
    (rows, width), dtype, device = x.shape, x.dtype, x.device
    columns = weight.shape[0] // 2 if silu_mul else weight.shape[0]
    if config is None:
        config = _config(device, dtype, rows, columns, width, silu_mul)
    if backend == "auto":
        backend = str(config["backend"])
        log_once(f"linear_few_rows on {device.type} runs in {backend}", logging.INFO)
    if backend == "torch":
        return _torch_silu_mul if silu_mul else _torch_linear
    constants = launch_constants(config, dtype, rows, width, device_arch(device))
    launch = _kernel.bind(
        device, cdiv(columns, constants["BLOCK_N"]), rows, IN=width, OUT=columns, SILU_MUL=silu_mul, **constants
    )

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        out = torch.empty((rows, columns), dtype=dtype, device=device)
        if rows and columns:
            bias, residual = (None if extra is None else extra.contiguous() for extra in (bias, residual))
            launch(out, x.contiguous(), weight.contiguous(), bias, residual)
        return out

    return run


def linear_few_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, silu_mul: bool = False,
    backend: str = "auto", config: Config | None = None,
) -> Tensor:  # fmt: skip
    """Arguments and result as in `keye_kernels.reference.linear_few_rows`; bias and residual have the dtype of x."""
    return prepare(x, weight, bias, residual, silu_mul, backend, config)(x, weight, bias, residual)


def _torch_linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    if residual is not None and bias is None:
        return torch.addmm(residual, x, weight.t())
    out = F.linear(x, weight, bias)
    return out if residual is None else out.add_(residual)


def _torch_silu_mul(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    gate_up = F.linear(x, weight, bias)
    out = silu_mul_kernel(*gate_up.split(gate_up.shape[1] // 2, dim=1))
    return out if residual is None else out.add_(residual)


def runs_in_triton(device: torch.device, dtype: torch.dtype, rows: int, weight: tuple[int, int], silu_mul: bool) -> bool:
    """Whether the launch config of a call chooses the kernel; `weight` is the shape of the weight."""
    columns = weight[0] // 2 if silu_mul else weight[0]
    return _config(device, dtype, rows, columns, weight[1], silu_mul)["backend"] == "triton"


def launch_constants(config: Config, dtype: torch.dtype, rows: int, width: int, arch: Arch) -> Config:
    """The constexprs and options of a launch that depend on the config. A block of K is not wider than K needs."""
    warps, use_pdl = config["num_warps"], config["use_pdl"] and has_pdl(arch)
    common = {"USE_PDL": use_pdl, "BLOCK_T": block_rows(rows, dtype, arch)}
    options = {"num_warps": warps, **({"launch_pdl": True} if use_pdl else {})}
    if "BLOCK_N" in config:
        block_k = min(config["BLOCK_K"], max(MIN_DOT_SIZE, next_power_of_2(width) // warps))
        sizes = {"BLOCK_N": config["BLOCK_N"], "BLOCK_K": block_k * warps, "SLICES": warps}
        return {**common, **sizes, **options, "num_stages": config["num_stages"]}
    block_k = min(warps * arch.warp_size * LOAD_BYTES // dtype.itemsize, next_power_of_2(width))
    return {**common, "BLOCK_N": config["BLOCK_C"], "BLOCK_K": block_k, "SLICES": 0, **options}


def has_pdl(arch: Arch) -> bool:
    """Whether programmatic dependent launch exists, whose functions Triton 3.4 has with other semantics."""
    return arch.capability >= 90 and TRITON_VERSION >= (3, 5)


def uses_dot(rows: int, dtype: torch.dtype) -> bool:
    return rows > MAX_MULTIPLY_ADD_ROWS and dtype != torch.float32


def block_rows(rows: int, dtype: torch.dtype, arch: Arch) -> int:
    """BLOCK_T: rows rounded up to a power of two, and to what `tl.dot` takes."""
    if not uses_dot(rows, dtype):
        return next_power_of_2(rows)
    return 8 if rows <= 8 and arch.is_nvidia and TRITON_VERSION >= (3, 5) else MIN_DOT_SIZE


def heuristic(arch: Arch, rows: int, dtype: torch.dtype, silu_mul: bool) -> Config:
    """The launch config where no table has an entry: 128 threads, each with 2 to 8 loads of 16 bytes for a block of the weight.

    The backend is torch, because the kernel has not been timed. BLOCK_C columns of multiply-adds, or BLOCK_N columns and BLOCK_K
    of each warp in `tl.dot`.
    """
    common = {"num_warps": 128 // arch.warp_size, "use_pdl": False, "backend": "torch"}
    if uses_dot(rows, dtype):
        return {"BLOCK_N": 16, "BLOCK_K": 64 if silu_mul else 128, "num_stages": 3, **common}
    columns = COLUMNS[next_power_of_2(rows)]
    return {"BLOCK_C": max(1, columns // 2) if silu_mul else columns, **common}


def config_key(rows: int, columns: int, width: int, dtype: torch.dtype, silu_mul: bool) -> ConfigKey:
    """The key of the tables. `block_rows` must match exactly: a config for one row may need too many registers for four."""
    epilogue = "silu_mul" if silu_mul else "none"
    sizes = {"block_rows": next_power_of_2(rows), "columns": columns, "width": width}
    return {**sizes, "dtype": dtype_name(dtype), "epilogue": epilogue}


@cache_config
def _config(device: torch.device, dtype: torch.dtype, rows: int, columns: int, width: int, silu_mul: bool) -> Config:
    key = config_key(rows, columns, width, dtype, silu_mul)
    return launch_config("linear_few_rows", device, key, heuristic(device_arch(device), rows, dtype, silu_mul))
