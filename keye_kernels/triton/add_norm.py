"""Residual add and the LayerNorm or RMSNorm after it, in one pass over the rows. T rows of C channels."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import Arch, device_arch
from .launch import Kernel
from .launch_config import Config, ConfigKey, cache_config, cdiv, dtype_name, launch_config, next_power_of_2

AddNormCall = Callable[[Tensor, Tensor | None, Tensor, Tensor | None], tuple[Tensor, Tensor]]  # as the arguments of `add_norm`


@triton.jit(do_not_specialize=["num_rows", "stride_x", "stride_residual"])
def add_norm_kernel(
    sum_ptr, normed_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr, num_rows, eps, stride_x, stride_residual,
    CHANNELS: tl.constexpr, STRIDE_UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program normalizes BLOCK_T rows, held in registers. BLOCK_C covers a row: 2048 for 1152; masked lanes load nothing."""
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    o_channel = tl.arange(0, BLOCK_C)[None, :]
    m_channel = o_channel < CHANNELS
    mask = (o_row < num_rows) & m_channel
    b_x = tl.load(x_ptr + o_row * (stride_x * STRIDE_UNIT) + o_channel, mask=mask, other=0.0)
    if residual_ptr is not None:
        b_residual = tl.load(residual_ptr + o_row * (stride_residual * STRIDE_UNIT) + o_channel, mask=mask, other=0.0)
        # The norm is that of the rounded sum, which later layers add to
        b_x = (b_x.to(tl.float32) + b_residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + o_row * CHANNELS + o_channel, b_x, mask=mask)
    b_normed = b_x.to(tl.float32)
    if bias_ptr is not None:
        mean = tl.sum(b_normed, 1, keep_dims=True) / CHANNELS
        b_normed = tl.where(m_channel, b_normed - mean, 0.0)
    variance = tl.sum(b_normed * b_normed, 1, keep_dims=True) / CHANNELS
    b_normed *= tl.rsqrt(variance + eps)
    b_normed *= tl.load(weight_ptr + o_channel, mask=m_channel, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        b_normed += tl.load(bias_ptr + o_channel, mask=m_channel, other=0.0).to(tl.float32)
    tl.store(normed_ptr + o_row * CHANNELS + o_channel, b_normed.to(normed_ptr.dtype.element_ty), mask=mask)


_kernel = Kernel(add_norm_kernel)


def prepare(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, config: Config | None = None
) -> AddNormCall:
    """A function that launches the kernel on tensors with the metadata of these, which are not read."""
    (num_rows, channels), dtype, device = x.shape, x.dtype, x.device
    shape, has_residual = x.shape, residual is not None
    config = config or _config(device, dtype, channels, num_rows)
    # The JIT specializes integers on divisibility by 16 only. Strides are passed in units of 8.
    stride_x, stride_residual = x.stride(0), residual.stride(0) if has_residual else 0
    unit = 8 if (stride_x | stride_residual) % 8 == 0 else 1
    launch = _kernel.bind(
        device, cdiv(num_rows, config["BLOCK_T"]), num_rows, eps, stride_x // unit, stride_residual // unit,
        CHANNELS=channels, STRIDE_UNIT=unit, BLOCK_T=config["BLOCK_T"], BLOCK_C=next_power_of_2(channels),
        num_warps=config["num_warps"],
    )  # fmt: skip

    def run(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        total = torch.empty(shape, dtype=dtype, device=device) if has_residual else None
        normed = torch.empty(shape, dtype=dtype, device=device)
        if num_rows:
            bias = None if bias is None else bias.contiguous()
            launch(total, normed, x, residual, weight.contiguous(), bias)
        return x if total is None else total, normed

    return run


def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """Launches the kernel. Arguments and results as in `keye_kernels.reference.add_norm`."""
    return prepare(x, residual, weight, bias, eps, config)(x, residual, weight, bias)


def heuristic(channels: int, arch: Arch) -> Config:
    """The launch config where no table has an entry: 16 channels per thread."""
    threads = next_power_of_2(channels) // 16
    return {"BLOCK_T": 1, "num_warps": min(8, max(1, threads // arch.warp_size))}


def config_key(dtype: torch.dtype, channels: int, num_rows: int) -> ConfigKey:
    """The key of the tables; rows are rounded up to a power of two."""
    return {"channels": channels, "dtype": dtype_name(dtype), "rows": next_power_of_2(num_rows)}


@cache_config
def _config(device: torch.device, dtype: torch.dtype, channels: int, num_rows: int) -> Config:
    key = config_key(dtype, channels, num_rows)
    return launch_config("add_norm", device, key, heuristic(channels, device_arch(device)))
