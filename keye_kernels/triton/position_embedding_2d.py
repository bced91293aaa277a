"""Learned 2D position embeddings, interpolated bilinearly and added to the patches in one launch for all images."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import Arch, device_arch
from .launch import Kernel
from .launch_config import Config, ConfigKey, cache_config, cdiv, dtype_name, launch_config, next_power_of_2


@triton.jit(do_not_specialize=["num_patches", "stride_token"])
def position_embedding_2d_kernel(
    out_ptr, features_ptr, table_ptr, index_ptr, weight_ptr, num_patches, stride_token,
    CHANNELS: tl.constexpr, STRIDE_UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program adds the four weighted table rows of BLOCK_T patches, BLOCK_C channels at a time."""
    o_token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_token = o_token < num_patches
    row_0 = tl.load(index_ptr + o_token * 4, mask=m_token, other=0)[:, None] * CHANNELS
    row_1 = tl.load(index_ptr + o_token * 4 + 1, mask=m_token, other=0)[:, None] * CHANNELS
    row_2 = tl.load(index_ptr + o_token * 4 + 2, mask=m_token, other=0)[:, None] * CHANNELS
    row_3 = tl.load(index_ptr + o_token * 4 + 3, mask=m_token, other=0)[:, None] * CHANNELS
    weight_0 = tl.load(weight_ptr + o_token * 4, mask=m_token, other=0.0)[:, None]
    weight_1 = tl.load(weight_ptr + o_token * 4 + 1, mask=m_token, other=0.0)[:, None]
    weight_2 = tl.load(weight_ptr + o_token * 4 + 2, mask=m_token, other=0.0)[:, None]
    weight_3 = tl.load(weight_ptr + o_token * 4 + 3, mask=m_token, other=0.0)[:, None]
    p_features = features_ptr + (o_token * stride_token * STRIDE_UNIT)[:, None]
    p_out = out_ptr + (o_token * CHANNELS)[:, None]
    for first_channel in range(0, CHANNELS, BLOCK_C):
        o_channel = first_channel + tl.arange(0, BLOCK_C)[None, :]
        mask = m_token[:, None] & (o_channel < CHANNELS)
        total = tl.load(p_features + o_channel, mask=mask, other=0.0).to(tl.float32)
        total += weight_0 * tl.load(table_ptr + row_0 + o_channel, mask=mask, other=0.0).to(tl.float32)
        total += weight_1 * tl.load(table_ptr + row_1 + o_channel, mask=mask, other=0.0).to(tl.float32)
        total += weight_2 * tl.load(table_ptr + row_2 + o_channel, mask=mask, other=0.0).to(tl.float32)
        total += weight_3 * tl.load(table_ptr + row_3 + o_channel, mask=mask, other=0.0).to(tl.float32)
        tl.store(p_out + o_channel, total.to(out_ptr.dtype.element_ty), mask=mask)


_kernel = Kernel(position_embedding_2d_kernel)


PositionCall = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # features, table, corner_index, corner_weight to the sum


def prepare(features: Tensor, table: Tensor, config: Config | None = None) -> PositionCall:
    """A function that launches the kernel on tensors with the metadata of these, which are not read."""
    (num_patches, channels), dtype, device = features.shape, features.dtype, features.device
    shape = features.shape
    config = config or _config(device, dtype, channels, num_patches)
    # The JIT specializes integers on divisibility by 16 only. Strides are passed in units of 8.
    unit = 8 if features.stride(0) % 8 == 0 else 1
    launch = _kernel.bind(
        device, cdiv(num_patches, config["BLOCK_T"]), num_patches, features.stride(0) // unit,
        CHANNELS=channels, STRIDE_UNIT=unit,
        BLOCK_T=config["BLOCK_T"], BLOCK_C=config["BLOCK_C"], num_warps=config["num_warps"],
    )  # fmt: skip

    def run(features: Tensor, table: Tensor, corner_index: Tensor, corner_weight: Tensor) -> Tensor:
        out = torch.empty(shape, dtype=dtype, device=device)
        if num_patches:
            launch(out, features, table.contiguous(), corner_index.contiguous(), corner_weight.contiguous())
        return out

    return run


def position_embedding_2d(
    features: Tensor, table: Tensor, corner_index: Tensor, corner_weight: Tensor, config: Config | None = None
) -> Tensor:
    """Launches the kernel. Arguments and result as in `keye_kernels.reference.position_embedding_2d`."""
    return prepare(features, table, config)(features, table, corner_index, corner_weight)


def heuristic(arch: Arch) -> Config:
    """The launch config where no table has an entry: 1152 channels are nine blocks of 128; 64 threads load 16 bytes each."""
    return {"BLOCK_T": 4, "BLOCK_C": 128, "num_warps": 64 // arch.warp_size}


def config_key(dtype: torch.dtype, channels: int, num_patches: int) -> ConfigKey:
    """The key of the tables; patches are rounded up to a power of two."""
    return {"channels": channels, "dtype": dtype_name(dtype), "patches": next_power_of_2(num_patches)}


@cache_config
def _config(device: torch.device, dtype: torch.dtype, channels: int, num_patches: int) -> Config:
    key = config_key(dtype, channels, num_patches)
    return launch_config("position_embedding_2d", device, key, heuristic(device_arch(device)))
