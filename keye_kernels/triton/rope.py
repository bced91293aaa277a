"""Rotary position embedding of q and k in one launch, after an optional RMSNorm of each head.

The same launch can write the rotated k, and a copy of v, into the slots of a key/value cache. The text model (three position
axes, 64 pairs) and the vision tower (two axes, 36 pairs) use the same kernel; they differ in the axis that each pair takes its
position from. Angles are computed in registers: no cos/sin table per token is read.
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import Arch, device_arch
from .launch import BoundLaunch, Kernel
from .launch_config import Config, ConfigKey, cache_config, cdiv, dtype_name, launch_config, next_power_of_2

ROUND = tl.constexpr(1.5 * 2**23)  # adding it rounds to an integer and leaves the integer in the low mantissa bits
INVERSE_PI = tl.constexpr(0.31830988618379067)
# pi = PI_1 + PI_2 + PI_3. The first two have five significant bits: their products with n up to 671,088 are exact.
PI_1, PI_2, PI_3 = tl.constexpr(25 / 8), tl.constexpr(17 / 1024), tl.constexpr(-8.908910206761537e-06)


@triton.jit
def _cos_sin(angle):
    """Cosine and sine, error below 6e-7 for |angle| up to 2**21. The slow path of libdevice spills registers."""
    # Explicit FMAs: contracting `angle - n * pi` could also remove the rounding of the angle to float32.
    shifted = tl.fma(angle, INVERSE_PI, ROUND)
    n = shifted - ROUND
    r = tl.fma(n, -PI_1, angle)
    r = tl.fma(n, -PI_2, r)
    r = tl.fma(n, -PI_3, r)
    # Minimax polynomials on |r| <= 1.72: n is off by up to 0.05 at the largest angles.
    r2 = r * r
    sin = tl.fma(r2, 2.570075366747915e-06, -0.0001979181106435135)
    sin = tl.fma(sin, r2, 0.008332792669534683)
    sin = tl.fma(sin, r2, -0.16666647791862488)
    sin = tl.fma(sin * r2, r, r)
    cos = tl.fma(r2, -2.5791521807150275e-07, 2.4744902475504205e-05)
    cos = tl.fma(cos, r2, -0.0013888059183955193)
    cos = tl.fma(cos, r2, 0.04166661202907562)
    cos = tl.fma(cos, r2, -0.5)
    cos = tl.fma(cos, r2, 1.0)
    # An odd n flips both signs.
    sign = shifted.to(tl.int32, bitcast=True) << 31
    cos = (cos.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    sin = (sin.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    return cos, sin


@triton.jit
def _angles(position_ptr, inv_freq_ptr, o_token, m_token, o_pair, stride_axis, stride_token,
            NUM_FREQUENCIES: tl.constexpr, SECTIONS: tl.constexpr):  # fmt: skip
    """[BLOCK_T, pairs]: float32 position times float32 frequency."""
    p_position = position_ptr + o_token * stride_token
    b_position = tl.load(p_position, mask=m_token, other=0).to(tl.float32)[:, None]
    first_pair: tl.constexpr = 0
    for axis in tl.static_range(1, len(SECTIONS)):
        first_pair += SECTIONS[axis - 1]
        b_axis = tl.load(p_position + axis * stride_axis, mask=m_token, other=0).to(tl.float32)
        b_position = tl.where(o_pair[None, :] < first_pair, b_position, b_axis[:, None])
    b_frequency = tl.load(inv_freq_ptr + o_pair % NUM_FREQUENCIES)
    return b_position * b_frequency[None, :]


@triton.jit
def _cache_rows(slot_ptr, o_token, m_token, num_slots, cache_slots):
    """Rows of a cache [B * cache_slots, channels] for tokens [B * num_slots], and a mask without the slots that do not exist."""
    o_token = o_token.to(tl.int32)
    b_slot = tl.load(slot_ptr + o_token % num_slots, mask=m_token, other=-1)
    return (o_token // num_slots).to(tl.int64) * cache_slots + b_slot, (b_slot >= 0) & (b_slot < cache_slots)


@triton.jit
def _rotate_heads(out_ptr, x_ptr, weight_ptr, first_token, o_out_row, m_token, o_pair, cos, sin, eps, stride_token, stride_head,
                  HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, STRIDE_UNIT: tl.constexpr, INT64_OFFSETS: tl.constexpr,
                  BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """Rotates the pairs `o_pair` of every head of BLOCK_T tokens, BLOCK_H heads at a time; copies them if `cos` is None.

    The output rows are `o_out_row` (int64), or those of the tokens if it is None.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    m_pair = o_pair < HALF
    o_row = tl.arange(0, BLOCK_T)[None, :, None]
    if INT64_OFFSETS:
        o_row = o_row.to(tl.int64)
    x_ptr += first_token * stride_token * STRIDE_UNIT
    if o_out_row is None:
        out_ptr += first_token * (HEADS * HEAD_DIM)
        o_out = o_row * (HEADS * HEAD_DIM)
    else:
        o_out = o_out_row[None, :, None] * (HEADS * HEAD_DIM)
    if weight_ptr is not None:
        w_first = tl.load(weight_ptr + o_pair, mask=m_pair, other=0.0).to(tl.float32)[None, None, :]
        w_second = tl.load(weight_ptr + HALF + o_pair, mask=m_pair, other=0.0).to(tl.float32)[None, None, :]
    for first_head in tl.static_range(0, HEADS, BLOCK_H):
        # [BLOCK_H, BLOCK_T, pairs]: heads are outermost, so that the registers of a thread hold several heads of one angle.
        o_head = first_head + tl.arange(0, BLOCK_H)[:, None, None]
        if INT64_OFFSETS:
            o_head = o_head.to(tl.int64)
        mask = m_token[None, :, None] & (o_head < HEADS) & m_pair[None, None, :]
        p_x = x_ptr + ((o_row * stride_token + o_head * stride_head) * STRIDE_UNIT + o_pair[None, None, :])
        x_first = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
        x_second = tl.load(p_x + HALF, mask=mask, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            mean = tl.sum(x_first * x_first + x_second * x_second, axis=2, keep_dims=True) / HEAD_DIM
            scale = tl.rsqrt(mean + eps)
            x_first *= scale * w_first
            x_second *= scale * w_second
        if cos is None:
            out_first, out_second = x_first, x_second
        else:
            out_first = x_first * cos - x_second * sin
            out_second = x_second * cos + x_first * sin
        p_out = out_ptr + (o_out + o_head * HEAD_DIM + o_pair[None, None, :])
        tl.store(p_out, out_first.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(p_out + HALF, out_second.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "stride_q_token", "stride_q_head", "stride_k_token", "stride_k_head",
                               "stride_v_token", "stride_v_head", "stride_p_axis", "stride_p_token", "num_slots",
                               "cache_slots"])  # fmt: skip
def rope_kernel(
    q_out_ptr, k_out_ptr, v_out_ptr, q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, inv_freq_ptr, position_ptr, slot_ptr,
    num_tokens, eps, stride_q_token, stride_q_head, stride_k_token, stride_k_head, stride_v_token, stride_v_head,
    stride_p_axis, stride_p_token, num_slots, cache_slots,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, NUM_FREQUENCIES: tl.constexpr,
    SECTIONS: tl.constexpr, CONJUGATE: tl.constexpr, STRIDE_UNIT: tl.constexpr, INT64_OFFSETS: tl.constexpr,
    PAIRS: tl.constexpr, TAIL: tl.constexpr, VECTOR: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One program rotates all heads of BLOCK_T tokens: the first PAIRS pairs, then TAIL pairs (36 = 32 + 4).

    With `slot_ptr`, `k_out_ptr` and `v_out_ptr` are caches, into which it writes k and a copy of v.
    """
    first_token = tl.program_id(0).to(tl.int64) * BLOCK_T
    o_token = first_token + tl.arange(0, BLOCK_T)
    m_token = o_token < num_tokens
    o_out_row = None
    m_row = m_token
    if slot_ptr is not None:
        o_out_row, m_row = _cache_rows(slot_ptr, o_token, m_token, num_slots, cache_slots)
    for part in tl.static_range(2 if TAIL else 1):
        # Both halves are loaded with the vector width of the second: between different layouts the compiler would convert through
        # shared memory.
        o_pair = tl.max_contiguous(tl.arange(0, PAIRS), VECTOR) if part == 0 else PAIRS + tl.arange(0, TAIL)
        cos, sin = _cos_sin(_angles(position_ptr, inv_freq_ptr, o_token, m_token, o_pair, stride_p_axis,
                                    stride_p_token, NUM_FREQUENCIES, SECTIONS))  # fmt: skip
        if CONJUGATE:
            sin = -sin
        _rotate_heads(q_out_ptr, q_ptr, q_weight_ptr, first_token, None, m_token, o_pair, cos[None], sin[None], eps,
                      stride_q_token, stride_q_head, Q_HEADS, HEAD_DIM, STRIDE_UNIT, INT64_OFFSETS, BLOCK_T, BLOCK_H)  # fmt: skip
        _rotate_heads(k_out_ptr, k_ptr, k_weight_ptr, first_token, o_out_row, m_row, o_pair, cos[None], sin[None], eps,
                      stride_k_token, stride_k_head, K_HEADS, HEAD_DIM, STRIDE_UNIT, INT64_OFFSETS, BLOCK_T, BLOCK_H)  # fmt: skip
        if slot_ptr is not None:
            _rotate_heads(v_out_ptr, v_ptr, None, first_token, o_out_row, m_row, o_pair, None, None, eps,
                          stride_v_token, stride_v_head, K_HEADS, HEAD_DIM, STRIDE_UNIT, INT64_OFFSETS,
                          BLOCK_T, BLOCK_H)  # fmt: skip


_kernel = Kernel(rope_kernel)
RopeCall = Callable[..., tuple[Tensor, Tensor]]  # q, k, position_ids, inv_freq, and the norm weights, to the rotated q and k


def heuristic(head_dim: int, arch: Arch) -> Config:
    """The launch config where no table has an entry. The kernel is bound by memory, so all architectures use as many threads.

    Head dim 128 in 16 bits: 128 threads with 8 channels each cover 2 tokens x 8 heads, which makes 16-byte accesses for q's 32
    heads and k's 8 heads, in at most 70 registers. Below: 64 threads with 4 channels cover the tail of 4 tokens x 16 heads.
    """
    if head_dim >= 128:
        return {"BLOCK_T": 2, "BLOCK_H": 8, "num_warps": 128 // arch.warp_size}
    return {"BLOCK_T": 4, "BLOCK_H": 16, "num_warps": 64 // arch.warp_size}


def config_key(dtype: torch.dtype, head_dim: int, num_tokens: int) -> ConfigKey:
    """The key of the tables; tokens are rounded up to a power of two."""
    return {"dtype": dtype_name(dtype), "head_dim": head_dim, "tokens": next_power_of_2(num_tokens)}


@cache
def cover_pairs(head_dim: int, has_norm: bool) -> dict[str, int]:
    """Powers of two that cover the pairs of a head: 36 = 32 + 4, or 64 where the norm needs the whole head at once."""
    half = head_dim // 2
    pairs, tail = next_power_of_2(half), 0
    if pairs != half and not has_norm:
        pairs, tail = pairs // 2, next_power_of_2(half - pairs // 2)
    # The second half starts at `half`: vectors up to the largest power of two that divides it stay aligned
    return {"PAIRS": pairs, "TAIL": tail, "VECTOR": half & -half}


@cache_config
def _config(device: torch.device, dtype: torch.dtype, head_dim: int, num_tokens: int) -> Config:
    key = config_key(dtype, head_dim, num_tokens)
    return launch_config("rope", device, key, heuristic(head_dim, device_arch(device)))


def _bind(
    q: Tensor, k: Tensor, position_ids: Tensor, inv_freq: Tensor, sections: Sequence[int], has_norm: bool, eps: float,
    conjugate: bool = False, config: Config | None = None, v: Tensor | None = None, num_slots: int = 0, cache_slots: int = 0,
) -> BoundLaunch:  # fmt: skip
    """The launch of `rope_kernel` for tensors with the metadata of these, which are not read."""
    (num_tokens, q_heads, head_dim), k_heads = q.shape, k.shape[1]
    config = config or _config(q.device, q.dtype, head_dim, num_tokens)
    # The JIT specializes integers on divisibility by 16 only. A stride of 72 is passed as 9 units of 8.
    strides = [stride for x in (q, k, v) for stride in ((0, 0) if x is None else x.stride()[:2])]
    unit, block = 1 if any(stride % 8 for stride in strides) else 8, config["BLOCK_T"]
    heads = q_heads, k_heads, k_heads
    reach = max(count * head + block * token for count, token, head in zip(heads, strides[::2], strides[1::2], strict=True))
    return _kernel.bind(
        q.device, cdiv(num_tokens, block),
        num_tokens, eps, *(stride // unit for stride in strides), *position_ids.stride(), num_slots, cache_slots,
        Q_HEADS=q_heads, K_HEADS=k_heads, HEAD_DIM=head_dim, NUM_FREQUENCIES=inv_freq.shape[0],
        SECTIONS=tuple(sections), CONJUGATE=conjugate, STRIDE_UNIT=unit, INT64_OFFSETS=reach >= 2**31,
        **cover_pairs(head_dim, has_norm),
        BLOCK_T=block, BLOCK_H=config["BLOCK_H"], num_warps=config["num_warps"],
    )  # fmt: skip


def prepare(
    q: Tensor, k: Tensor, position_ids: Tensor, inv_freq: Tensor, sections: Sequence[int], has_norm: bool = False,
    eps: float = 1e-6, conjugate: bool = False, config: Config | None = None,
) -> RopeCall:  # fmt: skip
    """A function that launches `rope_kernel` on tensors with the metadata of these, which are not read."""
    q_shape, k_shape, q_dtype, k_dtype, device = q.shape, k.shape, q.dtype, k.dtype, q.device
    launch = _bind(q, k, position_ids, inv_freq, sections, has_norm, eps, conjugate, config)

    def run(
        q: Tensor,
        k: Tensor,
        position_ids: Tensor,
        inv_freq: Tensor,
        q_weight: Tensor | None = None,
        k_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        q_out = torch.empty(q_shape, dtype=q_dtype, device=device)
        k_out = torch.empty(k_shape, dtype=k_dtype, device=device)
        if q_shape[0]:
            weights = [None if weight is None else weight.contiguous() for weight in (q_weight, k_weight)]
            launch(q_out, k_out, None, q, k, None, *weights, inv_freq.contiguous(), position_ids, None)
        return q_out, k_out

    return run


def prepare_to_cache(
    q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor, inv_freq: Tensor, sections: Sequence[int], key_cache: Tensor,
    slots: Tensor, has_norm: bool, eps: float, config: Config | None = None,
) -> Callable[..., Tensor]:  # fmt: skip
    """`prepare` for a launch that writes k and v into the slots of contiguous caches [B, M, Hk, D]; returns q."""
    q_shape, q_dtype, device = q.shape, q.dtype, q.device
    sizes = slots.shape[0], key_cache.shape[1]
    launch = _bind(q, k, position_ids, inv_freq, sections, has_norm, eps, False, config, v, *sizes)

    def run(
        q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor, inv_freq: Tensor, key_cache: Tensor, value_cache: Tensor,
        slots: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    ) -> Tensor:  # fmt: skip
        q_out = torch.empty(q_shape, dtype=q_dtype, device=device)
        if q_shape[0]:
            weights = [None if weight is None else weight.contiguous() for weight in (q_weight, k_weight)]
            outputs, others = (q_out, key_cache, value_cache), (inv_freq.contiguous(), position_ids, slots.contiguous())
            launch(*outputs, q, k, v, *weights, *others)
        return q_out

    return run


def rope(
    q: Tensor, k: Tensor, position_ids: Tensor, inv_freq: Tensor, sections: Sequence[int], q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None, eps: float = 1e-6, conjugate: bool = False, config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches `rope_kernel`. Arguments and results as in `keye_kernels.reference.rope`; the outputs are contiguous."""
    has_norm = q_norm_weight is not None or k_norm_weight is not None
    run = prepare(q, k, position_ids, inv_freq, sections, has_norm, eps, conjugate, config)
    return run(q, k, position_ids, inv_freq, q_norm_weight, k_norm_weight)


def rope_to_cache(
    q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor, inv_freq: Tensor, sections: Sequence[int], key_cache: Tensor,
    value_cache: Tensor, slots: Tensor, q_norm_weight: Tensor | None = None, k_norm_weight: Tensor | None = None,
    eps: float = 1e-6, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """Launches `rope_kernel`. Arguments and results as in `keye_kernels.reference.rope_to_cache`."""
    has_norm = q_norm_weight is not None or k_norm_weight is not None
    run = prepare_to_cache(q, k, v, position_ids, inv_freq, sections, key_cache, slots, has_norm, eps, config)
    return run(q, k, v, position_ids, inv_freq, key_cache, value_cache, slots, q_norm_weight, k_norm_weight)
