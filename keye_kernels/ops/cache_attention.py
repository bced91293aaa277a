"""Attention of new tokens to a key/value cache.

Symbols: B sequences, S new tokens per sequence, T = B·S, Hq query heads, Hk key heads, D head dim, M cache slots.
"""

import torch
from torch import Tensor

from keye_kernels import reference

from .checks import check_heads, check_indices, check_number, check_tensor
from .implementation import check_impl, kernel_inputs, resolve
from .prepared import call_key, find, remember
from .registry import call, define
from .varlen_attention import MAX_HEAD_DIM


def cache_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    valid: Tensor,
    slots: Tensor,
    *,
    softmax_scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Each new token attends to the valid slots of its sequence up to its own. Has no gradients.

    Its own key and value are in the cache already, see `rope_3d_to_cache`. Slots are checked on a CPU only, because reading them
    on a GPU would synchronize. Time depends on the highest of `slots`, not on M.

    Args:
        q: [T, Hq, D] with T = B·S, last axis contiguous; D a multiple of 8 up to 256.
        key_cache: [B, M, Hk, D] in the dtype of q, contiguous; Hk divides Hq, and query head h uses key head h // (Hq // Hk).
        value_cache: like `key_cache`.
        valid: [B, M] bool, False for padding. What is not valid may hold any value. Slots after the last of `slots` do not count.
        slots: [S] int64, the slots of the new tokens, the same for every sequence.
        softmax_scale: default: D ** -0.5.
        impl: "auto", "reference" or "triton".

    Returns:
        [T, Hq, D], contiguous, in the dtype of q, 0 for a token without a valid slot.

    Raises:
        ValueError: wrong shape, device, layout or slots, a tensor that requires a gradient while gradients are enabled, or an
            implementation that cannot run here.
        TypeError: wrong dtype or type.
    """
    tensors = q, key_cache, value_cache, valid, slots
    key = call_key("cache_attention", impl, (softmax_scale,), *tensors)
    if run := find(key):
        return run(*tensors)
    check_impl(impl, "cache_attention")
    check_heads("q", q)
    head_dim = q.shape[2]
    if head_dim % 8 or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"q must have a head dim that is a multiple of 8 up to {MAX_HEAD_DIM}, got {head_dim}")
    check_tensor("key_cache", key_cache, ("B", "M", "Hk", head_dim), (q.dtype,), q)
    check_tensor("value_cache", value_cache, tuple(key_cache.shape), (q.dtype,), q)
    batch_size, cache_slots, key_heads, _ = key_cache.shape
    if key_heads == 0 or q.shape[1] == 0 or q.shape[1] % key_heads:
        raise ValueError(f"key_cache must have a number of heads that divides the {q.shape[1]} of q, got {key_heads}")
    check_tensor("valid", valid, (batch_size, cache_slots), (torch.bool,), q)
    check_tensor("slots", slots, ("S",), (torch.int64,), q)
    if q.shape[0] != batch_size * slots.shape[0]:
        wanted = f"{batch_size} sequences of key_cache x {slots.shape[0]} slots"
        raise ValueError(f"q must have the tokens of {wanted}, got {q.shape[0]} tokens")
    for name, x in (("key_cache", key_cache), ("value_cache", value_cache), ("valid", valid)):
        if not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {list(x.stride())}")
    if torch.is_grad_enabled():
        for name, x in (("q", q), ("key_cache", key_cache), ("value_cache", value_cache)):
            if x.requires_grad:
                raise ValueError(f"{name} must not require a gradient: cache_attention has none; use torch.no_grad()")
    if softmax_scale is not None:
        check_number("softmax_scale", softmax_scale)
    scale = head_dim**-0.5 if softmax_scale is None else float(softmax_scale)
    if key is not None and resolve(impl, "cache_attention", q.device, q.dtype) == "triton":
        from keye_kernels.triton.cache_attention import prepare

        return remember(key, prepare(q, key_cache, slots, scale))(*tensors)
    return call(_cache_attention_op, *tensors, scale, impl)


def _run(q, key_cache, value_cache, valid, slots, softmax_scale, impl):
    check_indices("slots", slots, key_cache.shape[1])
    if resolve(impl, "cache_attention", q.device, q.dtype) == "reference":
        return reference.cache_attention(q, key_cache, value_cache, valid, slots, softmax_scale)
    from keye_kernels.triton.cache_attention import cache_attention as run

    return run(*kernel_inputs(q, key_cache, value_cache), valid, slots, softmax_scale).to(q.dtype)


def _fake(q, key_cache, value_cache, valid, slots, softmax_scale, impl):
    return q.new_empty(q.shape)


define(
    "cache_attention",
    "Tensor q, Tensor key_cache, Tensor value_cache, Tensor valid, Tensor slots, float softmax_scale, str impl",
    "Tensor", _run, _fake,
)  # fmt: skip
_cache_attention_op = torch.ops.keye_kernels.cache_attention.default
