"""silu(gate) * up, the activation of the decoder's MLP, on two tensors or two halves of one. T rows of C channels."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import Arch, device_arch
from .launch import Kernel
from .launch_config import Config, ConfigKey, cache_config, cdiv, dtype_name, launch_config, next_power_of_2

SiluMulCall = Callable[[Tensor, Tensor], Tensor]  # gate, up


@triton.jit(do_not_specialize=["num_rows", "stride_gate", "stride_up"])
def silu_mul_kernel(
    out_ptr, gate_ptr, up_ptr, num_rows, stride_gate, stride_up,
    CHANNELS: tl.constexpr, STRIDE_UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_T rows of BLOCK_C channels."""
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    o_row = (tl.program_id(0) // BLOCKS).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_channel = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (o_row < num_rows)[:, None] & (o_channel < CHANNELS)[None, :]
    p_gate = gate_ptr + o_row[:, None] * (stride_gate * STRIDE_UNIT) + o_channel[None, :]
    p_up = up_ptr + o_row[:, None] * (stride_up * STRIDE_UNIT) + o_channel[None, :]
    b_gate = tl.load(p_gate, mask=mask, other=0.0).to(tl.float32)
    b_up = tl.load(p_up, mask=mask, other=0.0).to(tl.float32)
    b_out = b_gate / (1.0 + tl.exp(-b_gate)) * b_up
    tl.store(out_ptr + o_row[:, None] * CHANNELS + o_channel[None, :], b_out.to(out_ptr.dtype.element_ty), mask=mask)


_kernel = Kernel(silu_mul_kernel)


def prepare(gate: Tensor, up: Tensor, config: Config | None = None) -> SiluMulCall:
    """A function that launches the kernel on tensors with the metadata of these, which are not read."""
    (num_rows, channels), dtype, device, shape = gate.shape, gate.dtype, gate.device, gate.shape
    config = config or _config(device, dtype, channels, num_rows)
    # The JIT specializes integers on divisibility by 16 only. Strides are passed in units of 8.
    stride_gate, stride_up = gate.stride(0), up.stride(0)
    unit = 8 if (stride_gate | stride_up) % 8 == 0 else 1
    launch = _kernel.bind(
        device, cdiv(num_rows, config["BLOCK_T"]) * cdiv(channels, config["BLOCK_C"]),
        num_rows, stride_gate // unit, stride_up // unit, CHANNELS=channels, STRIDE_UNIT=unit,
        BLOCK_T=config["BLOCK_T"], BLOCK_C=config["BLOCK_C"], num_warps=config["num_warps"],
    )  # fmt: skip

    def run(gate: Tensor, up: Tensor) -> Tensor:
        out = torch.empty(shape, dtype=dtype, device=device)
        if num_rows:
            launch(out, gate, up)
        return out

    return run


def silu_mul(gate: Tensor, up: Tensor, config: Config | None = None) -> Tensor:
    """Launches the kernel. Arguments and result as in `keye_kernels.reference.silu_mul`; the last axes are contiguous."""
    return prepare(gate, up, config)(gate, up)


def heuristic(arch: Arch) -> Config:
    """The launch config where no table has an entry: 8 channels, a 16-byte load, per thread."""
    return {"BLOCK_T": 1, "BLOCK_C": 1024, "num_warps": 128 // arch.warp_size}


def config_key(dtype: torch.dtype, channels: int, num_rows: int) -> ConfigKey:
    """The key of the tables; rows are rounded up to a power of two."""
    return {"channels": channels, "dtype": dtype_name(dtype), "rows": next_power_of_2(num_rows)}


@cache_config
def _config(device: torch.device, dtype: torch.dtype, channels: int, num_rows: int) -> Config:
    return launch_config("silu_mul", device, config_key(dtype, channels, num_rows), heuristic(device_arch(device)))
