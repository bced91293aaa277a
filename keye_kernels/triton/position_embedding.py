"""The learned 2D positions, interpolated bilinearly where they are added: one launch for any number of images."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Kernel
from .spec import CompileSpec
from .tiles import Config, cdiv, dtype_name, next_power_of_2, tile


@triton.jit(do_not_specialize=["num_patches", "stride_token"])
def position_embedding_2d_kernel(
    out_ptr, features_ptr, table_ptr, index_ptr, weight_ptr, num_patches, stride_token,
    CHANNELS: tl.constexpr, STRIDE_UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program adds the four weighted table rows of BLOCK_T patches, BLOCK_C channels at a time."""
    o_token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_token = o_token < num_patches
    # Read once for all channels.
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


_launch = Kernel(position_embedding_2d_kernel)


def heuristic(warp_size: int) -> dict[str, int]:
    """The tile without a table: 1152 = 9 x 128 channels leave no lane idle, 64 threads hold 16 bytes each."""
    return {"BLOCK_T": 4, "BLOCK_C": 128, "num_warps": 64 // warp_size}


def tile_key(dtype: torch.dtype, channels: int, num_patches: int) -> dict[str, int | str]:
    """What a tile table tells cases apart by."""
    return {"channels": channels, "dtype": dtype_name(dtype), "patches": next_power_of_2(num_patches)}


def position_embedding_2d(
    features: Tensor, table: Tensor, corner_index: Tensor, corner_weight: Tensor, config: Config | None = None
) -> Tensor:
    """Launches the kernel; arguments and result as in `keye_kernels.reference.position_embedding_2d`.

    `config` is the tile; None: the table's or the heuristic's.
    """
    num_patches, channels = features.shape
    out = torch.empty(features.shape, dtype=features.dtype, device=features.device)
    if num_patches == 0:
        return out
    if config is None:
        key = tile_key(features.dtype, channels, num_patches)
        config = tile("position_embedding_2d", features.device, key, heuristic(64 if torch.version.hip else 32))
    unit = 8 if features.stride(0) % 8 == 0 else 1  # the JIT learns "divisible by 16" of an integer and nothing weaker
    with torch.cuda.device_of(features):
        _launch(
            cdiv(num_patches, config["BLOCK_T"]),
            out, features, table.contiguous(), corner_index.contiguous(), corner_weight.contiguous(),
            num_patches, features.stride(0) // unit, CHANNELS=channels, STRIDE_UNIT=unit,
            BLOCK_T=config["BLOCK_T"], BLOCK_C=config["BLOCK_C"], num_warps=config["num_warps"],
        )  # fmt: skip
    return out


def compile_spec(dtype: str, config: Config) -> CompileSpec:
    """The vision tower's variant in a tile; `dtype` is Triton's name."""
    signature = {
        "out_ptr": f"*{dtype}:16", "features_ptr": f"*{dtype}:16", "table_ptr": f"*{dtype}:16",
        "index_ptr": "*i32:16", "weight_ptr": "*fp32:16", "num_patches": "i32", "stride_token": "i32",
        "CHANNELS": 1152, "STRIDE_UNIT": 8, "BLOCK_T": config["BLOCK_T"], "BLOCK_C": config["BLOCK_C"],
    }  # fmt: skip
    return CompileSpec(
        position_embedding_2d_kernel, dtype, signature, config["num_warps"], num_stages=3, uses_tensor_cores=False
    )


def compile_specs(arch: int | str) -> list[CompileSpec]:
    """The vision tower's variants, the same for every target."""
    config = heuristic(64 if isinstance(arch, str) else 32)
    return [compile_spec(dtype, config) for dtype in ("bf16", "fp16", "fp32")]
