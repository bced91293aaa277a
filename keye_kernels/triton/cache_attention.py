"""Attention of new tokens to a key/value cache, as in decoding. The keys of one sequence are divided among many programs.

One token reads each key once, for a few multiplications: the bandwidth of the memory is the limit, and a program per head would
leave most of the GPU idle. Splitting along the keys, with a second launch that combines the parts: Flash-Decoding (Dao et al.
2023, https://pytorch.org/blog/flash-decoding/). Which slots are used is read on the device, so that one CUDA graph serves a
cache of any fill, and time depends on the slots in use and not on those allocated.
Symbols: B sequences, S new tokens per sequence, T = B·S, Hq query heads, Hk key heads, D head dim, M cache slots.
"""

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import Arch, device_arch
from .launch import Kernel
from .launch_config import Config, ConfigKey, cache_config, cdiv, dtype_name, launch_config, next_power_of_2

LOG2_E = math.log2(math.e)
MIN_ROWS, MAX_ROWS = 16, 64  # queries of a program; tl.dot needs 16
PROGRAMS_PER_MULTIPROCESSOR = 2
MAX_SPLITS = 64
COMBINE_WARPS = 4


@triton.jit(do_not_specialize=["num_new", "cache_slots"])
def cache_attention_kernel(
    partial_ptr, stats_ptr, q_ptr, key_ptr, value_ptr, valid_ptr, slot_ptr, scale, num_new, cache_slots,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, NUM_SPLITS: tl.constexpr, ROW_BLOCKS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: the queries of one key head (GROUP heads of up to BLOCK_R / GROUP tokens) over one part of the keys.

    Row r is query head r % GROUP of token r // GROUP. Stores the sum of exp(score - maximum) * v of each row, not normalized,
    and in `stats` the maximum, in base 2, and the sum of the weights.
    """
    pid = tl.program_id(0)
    split, place = pid % NUM_SPLITS, pid // NUM_SPLITS
    row_block, place = place % ROW_BLOCKS, place // ROW_BLOCKS
    head, sequence = place % KEY_HEADS, (place // KEY_HEADS).to(tl.int64)

    o_row, o_n, o_d = row_block * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    m_row, m_d = o_row < num_new * GROUP, o_d < HEAD_DIM
    b_slot = tl.load(slot_ptr + o_row // GROUP, mask=m_row, other=-1)  # of each query
    p_q = q_ptr + ((sequence * num_new + o_row // GROUP) * KEY_HEADS * GROUP + head * GROUP + o_row % GROUP) * HEAD_DIM
    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_row[:, None] & m_d[None, :], other=0.0)

    used = tl.minimum(tl.max(b_slot, 0) + 1, cache_slots).to(tl.int32)
    keys_per_split = tl.cdiv(tl.cdiv(used, BLOCK_N), NUM_SPLITS) * BLOCK_N
    first, end = split * keys_per_split, tl.minimum((split + 1) * keys_per_split, used)
    valid_ptr += sequence * cache_slots
    offset = sequence * cache_slots * (KEY_HEADS * HEAD_DIM) + head * HEAD_DIM
    p_key, p_value = key_ptr + offset + o_d[None, :], value_ptr + offset + o_d[None, :]

    b_max = tl.full([BLOCK_R], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_R], tl.float32)
    b_acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for first_key in tl.range(first, end, BLOCK_N):
        o_key = first_key + o_n
        m_key = tl.load(valid_ptr + o_key, mask=o_key < end, other=0) != 0
        o_x = o_key.to(tl.int64)[:, None] * (KEY_HEADS * HEAD_DIM)
        mask = m_key[:, None] & m_d[None, :]  # what is not valid may be NaN
        b_key = tl.load(p_key + o_x, mask=mask, other=0.0)
        b_score = tl.dot(b_q, b_key.T, input_precision="ieee") * scale
        b_score = tl.where(m_key[None, :] & (o_key[None, :] <= b_slot[:, None]), b_score, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_score, 1))
        b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_p = tl.exp2(b_score - b_shift[:, None])
        b_rescale = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
        b_value = tl.load(p_value + o_x, mask=mask, other=0.0)
        b_acc = tl.dot(b_p.to(b_value.dtype), b_value, b_acc * b_rescale[:, None], input_precision="ieee")
        b_max = b_new_max

    o_out = ((sequence * KEY_HEADS + head) * num_new * GROUP + o_row) * NUM_SPLITS + split
    if first < end:
        tl.store(partial_ptr + o_out[:, None] * HEAD_DIM + o_d[None, :], b_acc, mask=m_row[:, None] & m_d[None, :])
    tl.store(stats_ptr + 2 * o_out, b_max, mask=m_row)
    tl.store(stats_ptr + 2 * o_out + 1, b_sum, mask=m_row)


@triton.jit(do_not_specialize=["num_new"])
def combine_kernel(
    out_ptr, partial_ptr, stats_ptr, num_new,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, NUM_SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: the output of one query head of one token, from all parts of the keys."""
    pid = tl.program_id(0).to(tl.int64)
    row, place = pid % (num_new * GROUP), pid // (num_new * GROUP)
    head, sequence = place % KEY_HEADS, place // KEY_HEADS
    o_split, o_d = pid * NUM_SPLITS + tl.arange(0, NUM_SPLITS), tl.arange(0, BLOCK_D)
    b_max, b_sum = tl.load(stats_ptr + 2 * o_split), tl.load(stats_ptr + 2 * o_split + 1)
    b_top = tl.max(b_max, 0)
    b_weight = tl.exp2(b_max - tl.where(b_top == float("-inf"), 0.0, b_top))
    # Parts without keys were not stored
    mask = (b_sum > 0)[:, None] & (o_d < HEAD_DIM)[None, :]
    b_partial = tl.load(partial_ptr + o_split[:, None] * HEAD_DIM + o_d[None, :], mask=mask, other=0.0)
    total = tl.sum(b_sum * b_weight, 0)
    b_out = tl.sum(b_partial * b_weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    p_out = out_ptr + ((sequence * num_new + row // GROUP) * KEY_HEADS * GROUP + head * GROUP + row % GROUP) * HEAD_DIM
    tl.store(p_out + o_d, b_out.to(out_ptr.dtype.element_ty), mask=o_d < HEAD_DIM)


_kernel = Kernel(cache_attention_kernel)
_combine = Kernel(combine_kernel)
CacheAttentionCall = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # q, the caches, valid, slots to out


def prepare(
    q: Tensor, key_cache: Tensor, slots: Tensor, softmax_scale: float, config: Config | None = None
) -> CacheAttentionCall:
    """A function that launches the kernels on tensors with the metadata of these, which are not read."""
    (num_tokens, num_heads, head_dim), dtype, device = q.shape, q.dtype, q.device
    batch_size, cache_slots, key_heads, _ = key_cache.shape
    num_new, group = slots.shape[0], num_heads // key_heads
    config = config or _config(device, dtype, head_dim, num_tokens)
    rows = num_new * group
    block_r = min(MAX_ROWS, max(MIN_ROWS, next_power_of_2(rows)))
    row_blocks = cdiv(rows, block_r)
    splits = num_splits(batch_size * key_heads * row_blocks, device_arch(device))
    sizes = {"KEY_HEADS": key_heads, "GROUP": group, "HEAD_DIM": head_dim, "NUM_SPLITS": splits}
    block_d = next_power_of_2(head_dim)
    launch = _kernel.bind(
        device, batch_size * key_heads * row_blocks * splits, softmax_scale * LOG2_E, num_new, cache_slots,
        **sizes, ROW_BLOCKS=row_blocks, BLOCK_R=block_r, BLOCK_N=config["BLOCK_N"], BLOCK_D=block_d,
        num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip
    combine = _combine.bind(device, num_tokens * num_heads, num_new, **sizes, BLOCK_D=block_d, num_warps=COMBINE_WARPS)
    shape = q.shape

    def run(q: Tensor, key_cache: Tensor, value_cache: Tensor, valid: Tensor, slots: Tensor) -> Tensor:
        out = torch.empty(shape, dtype=dtype, device=device)
        if num_tokens:
            partial = torch.empty((num_tokens * num_heads, splits, head_dim), dtype=torch.float32, device=device)
            stats = torch.empty((num_tokens * num_heads, splits, 2), dtype=torch.float32, device=device)
            launch(partial, stats, q.contiguous(), key_cache, value_cache, valid, slots.contiguous())
            combine(out, partial, stats)
        return out

    return run


def cache_attention(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, valid: Tensor, slots: Tensor, softmax_scale: float,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """Launches the kernels. Arguments and result as in `keye_kernels.reference.cache_attention`; the caches are contiguous."""
    return prepare(q, key_cache, slots, softmax_scale, config)(q, key_cache, value_cache, valid, slots)


def num_splits(programs: int, arch: Arch) -> int:
    """Parts of the keys, a power of two: about as many as fill the GPU, where one part needs `programs` programs.

    Does not depend on the size of the cache: the kernel is compiled for this number.
    """
    wanted = PROGRAMS_PER_MULTIPROCESSOR * arch.num_multiprocessors // max(1, programs)
    return min(MAX_SPLITS, 1 << max(0, wanted.bit_length() - 1))


def heuristic(dtype: torch.dtype) -> Config:
    """The launch config where no table has an entry: 64 KB of keys and values in flight per program, with a head dim of 128."""
    if dtype == torch.float32:  # no tensor cores: matmul operands are held in registers
        return {"BLOCK_N": 16, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_N": 32, "num_warps": 4, "num_stages": 4}


def config_key(dtype: torch.dtype, head_dim: int, num_tokens: int) -> ConfigKey:
    """The key of the tables; tokens are rounded up to a power of two."""
    return {"dtype": dtype_name(dtype), "head_dim": head_dim, "tokens": next_power_of_2(num_tokens)}


@cache_config
def _config(device: torch.device, dtype: torch.dtype, head_dim: int, num_tokens: int) -> Config:
    return launch_config("cache_attention", device, config_key(dtype, head_dim, num_tokens), heuristic(dtype))
