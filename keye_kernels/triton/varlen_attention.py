"""Attention over packed segments: the launch of `varlen_attention_fwd_kernel` and its launch configs."""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .device import Arch, device_arch
from .launch import Kernel
from .launch_config import Config, ConfigKey, cache_config, dtype_name, launch_config, next_power_of_2
from .spec import TRITON_VERSION
from .tma import BlockShape, make_descriptors
from .varlen_attention_kernel import varlen_attention_fwd_kernel

LOG2_E = math.log2(math.e)
# Keys and values in use at the same time: less than half of the L2 cache of an A100 or H100
L2_GROUP_BYTES = 16 * 2**20

_kernel = Kernel(varlen_attention_fwd_kernel)
AttentionCall = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # q, k, v, cu_seqlens to out, lse


def prepare(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, softmax_scale: float, causal: bool, return_lse: bool,
    schedule: Tensor | None = None, covers_all_tokens: bool = False, config: Config | None = None,
) -> AttentionCall:  # fmt: skip
    """A function that launches the kernel on tensors with the metadata of these, and the values of `schedule`.

    `schedule` is [tiles, 3] int32 from `keye_kernels.segments.tile_schedule`, for the BLOCK_M of the config. Without it the
    kernel finds its tiles in `cu_seqlens`; offsets are not checked then, and out-of-range ones are clamped. `covers_all_tokens`:
    every token belongs to a segment, so that the output needs no zero fill. `max_seqlen` only chooses the config.
    """
    (num_tokens, num_heads, head_dim), num_key_heads = q.shape, k.shape[1]
    shape, dtype, device = q.shape, q.dtype, q.device
    config = config or attention_config(device, dtype, head_dim, max_seqlen, causal)
    num_segments = cu_seqlens.shape[0] - 1
    num_tiles = num_tokens // config["BLOCK_M"] + num_segments if schedule is None else schedule.shape[0]
    is_empty = num_tiles == 0 or num_segments == 0
    # The JIT specializes integers on divisibility by 16 only. A stride of 72 is passed as 9 units of 8.
    (q_token, q_head, _), (k_token, k_head, _), (v_token, v_head, _) = q.stride(), k.stride(), v.stride()
    if softmax_scale < 0:  # `run` negates q
        q_token, q_head, _ = torch.empty_like(q, device="meta").stride()
    unit = 8 if not (q_head | k_head | v_head) % 8 else 1
    group = num_heads // num_key_heads
    bytes_per_key_head = 2 * min(max_seqlen, num_tokens) * head_dim * k.element_size()
    parts = head_parts(head_dim, device_arch(device))
    blocks = key_blocks(config["BLOCK_N"], parts)
    launch = _kernel.bind(
        device, num_tiles * num_heads,
        abs(softmax_scale) * LOG2_E, num_segments, num_tokens, num_tiles,
        heads_per_l2_group(num_key_heads, group, bytes_per_key_head), q_head // unit, k_head // unit, v_head // unit,
        STRIDE_Q=q_token, STRIDE_K=k_token, STRIDE_V=v_token, STRIDE_UNIT=unit,
        NUM_HEADS=num_heads, GROUP=group, HEAD_DIM=head_dim, **parts, CAUSAL=causal, RETURN_LSE=return_lse,
        **{name: config[name] for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")},
    )  # fmt: skip
    new = torch.empty if covers_all_tokens else torch.zeros
    no_lse = torch.empty((num_heads, 0), dtype=torch.float32, device=device)

    def run(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        out = new(shape, dtype=dtype, device=device)
        lse = no_lse
        if return_lse:
            lse = torch.empty((num_heads, num_tokens), dtype=torch.float32, device=device)
            if not covers_all_tokens:
                lse.fill_(-math.inf)
        if is_empty:
            return out, lse
        if softmax_scale < 0:  # the kernel needs a positive scale
            q = -q
        offsets = cu_seqlens if schedule is None else None
        if config["use_tma"]:
            descriptors = make_descriptors(config, *zip((k, k, v, v), blocks, strict=True))
            launch.launch(out, lse, q, k, v, *descriptors, schedule, offsets)
        else:
            launch(out, lse, q, k, v, None, None, None, None, schedule, offsets)
        return out, lse

    return run


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, softmax_scale: float, causal: bool, return_lse: bool,
    schedule: Tensor | None = None, covers_all_tokens: bool = False, config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches the kernel. Arguments as in `prepare`, results as in `keye_kernels.reference.varlen_attention`."""
    options = max_seqlen, softmax_scale, causal, return_lse, schedule, covers_all_tokens, config
    return prepare(q, k, v, cu_seqlens, *options)(q, k, v, cu_seqlens)


def heads_per_l2_group(num_key_heads: int, group: int, bytes_per_key_head: int) -> int:
    """How many query heads go through all tiles before the next heads start.

    All of them if the keys and values of the longest segment fit L2_GROUP_BYTES, else as many as fit: programs that run at the
    same time then read the same keys and values from L2.
    """
    fitting = max(1, min(num_key_heads, L2_GROUP_BYTES // max(1, bytes_per_key_head)))
    return group * next(heads for heads in range(fitting, 0, -1) if num_key_heads % heads == 0)


@cache
def head_parts(head_dim: int, arch: Arch) -> dict[str, int]:
    """Powers of two that cover a head: 72 is 64 + 16 in QKᵀ, whose K is at least 16, and 64 + 8 in PV.

    At most two parts: 88 is 64 + 32. A tail as wide as the main part is merged into it: 112 is 128.
    """
    main = max(16, 1 << head_dim.bit_length() - 1)
    if head_dim <= main:
        return {"MAIN": main, "QK_TAIL": 0, "PV_TAIL": 0}
    tail = next_power_of_2(head_dim - main)
    if max(tail, 16) >= main:
        return {"MAIN": 2 * main, "QK_TAIL": 0, "PV_TAIL": 0}
    # tcgen05 has no 128 x 8 matmul, although Triton emits one. AMD's matrix cores and Triton 3.4 need N >= 16. Above 64 + 8
    # channels, blocks have too few keys to give every thread two channels of the 8.
    has_n8 = arch.is_nvidia and not arch.has_tcgen05 and main <= 64 and TRITON_VERSION >= (3, 5)
    return {"MAIN": main, "QK_TAIL": max(tail, 16), "PV_TAIL": max(tail, 8 if has_n8 else 16)}


def key_blocks(block_n: int, parts: dict[str, int]) -> list[BlockShape]:
    """[keys, heads, channels] of the blocks of k, k's tail, v and v's tail; None where there is no tail."""
    widths = parts["MAIN"], parts["QK_TAIL"], parts["MAIN"], parts["PV_TAIL"]
    return [[block_n, 1, width] if width else None for width in widths]


def heuristic(arch: Arch, head_dim: int, dtype: torch.dtype) -> Config:
    """The launch config where no table has an entry: few instructions per score in the hot loop, and no spills.

    It does not depend on the segment lengths, above all BLOCK_N does not: the sums of a query are then made in the same order
    whatever it is packed with. On sm_90 it is the fastest config of an H200 at every timed length: two or three blocks of 4 warps
    per multiprocessor, where one computes exponentials while another runs matmuls. tcgen05 needs 128 rows, and mma.sync takes
    13 instructions per score with 64.
    """
    if dtype == torch.float32:  # no tensor cores: matmul operands are held in registers
        return _config_of(32, 32, 8) if head_dim <= 80 else _config_of(16, 16, 8)
    if not arch.is_nvidia:
        return _config_of(128, 64, 4) if head_dim <= 128 else _config_of(64, 32, 4)
    if arch.has_wgmma and head_dim <= 128:
        return _config_of(128 if head_dim <= 80 else 64, 64, 4, num_stages=3)
    if head_dim <= (128 if arch.has_tcgen05 else 80):
        return _config_of(128, 128, 8)
    if head_dim <= 160 or arch.has_wgmma:
        return _config_of(128, 64, 8)
    return _config_of(128, 32, 8) if arch.has_tcgen05 else _config_of(64, 32, 4)


def _config_of(block_m: int, block_n: int, num_warps: int, num_stages: int = 2) -> Config:
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}
    # TMA and torch's FlashAttention-2 are used where a timed table says so
    return {**sizes, "use_tma": False, "backend": "triton"}


def config_key(dtype: torch.dtype, head_dim: int, max_seqlen: int, causal: bool) -> ConfigKey:
    """The key of the tables; max_seqlen is rounded up to a power of two."""
    mask = "causal" if causal else "none"
    return {"dtype": dtype_name(dtype), "head_dim": head_dim, "mask": mask, "max_seqlen": next_power_of_2(max_seqlen)}


@cache_config
def attention_config(device: torch.device, dtype: torch.dtype, head_dim: int, max_seqlen: int, causal: bool) -> Config:
    """The launch config of a call, and in `backend` what impl="auto" runs."""
    key = config_key(dtype, head_dim, max_seqlen, causal)
    return launch_config("varlen_attention", device, key, heuristic(device_arch(device), head_dim, dtype))
