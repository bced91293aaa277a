"""The rope of the decoder, with k and v written into a key/value cache by the same launch.

Symbols: B sequences, S tokens per sequence, T = B·S, Hq query heads, Hk key heads, D head dim, P = D/2 pairs, M cache slots.
"""

import torch
from torch import Tensor

from keye_kernels import reference

from . import cpu
from .checks import check_indices, check_last_axis, check_tensor
from .implementation import check_impl, kernel_inputs, resolve
from .prepared import call_key, find, remember
from .registry import call, define
from .rope import check_rope_3d


def rope_3d_to_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_ids: Tensor,
    inv_freq: Tensor,
    mrope_section: list[int] | tuple[int, ...],
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    *,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:
    """`rope_3d`, with the rotated k and a copy of v written into a key/value cache instead of returned. Has no gradients.

    Token s of sequence b is written to `key_cache[b, slots[s]]` and `value_cache[b, slots[s]]`. Slots are checked on a CPU only,
    because reading them on a GPU would synchronize. There, nothing is written for a slot out of range.

    Args:
        q: [T, Hq, D] with T = B·S, any token and head stride, last axis contiguous. Not modified.
        k: [T, Hk, D], likewise.
        v: [T, Hk, D] in the dtype of k, likewise.
        position_ids: [3, T] int32 or int64: time, height and width of each token.
        inv_freq: [P] float32 inverse frequencies.
        mrope_section: how many pairs take their position from time, height and width, in this order; the sum is P.
        key_cache: [B, M, Hk, D] in the dtype of k, contiguous. Modified in place.
        value_cache: likewise for v; must not share memory with `key_cache`.
        slots: [S] int64, distinct, from 0 to M - 1; the same for every sequence.
        q_norm_weight: [D], weight of an RMSNorm of each head of q before the rotation.
        k_norm_weight: [D], likewise for k; both or neither.
        eps: of the RMSNorm.
        impl: "auto", "reference" or "triton".

    Returns:
        A rotated copy of q, contiguous, in its dtype.

    Raises:
        ValueError: wrong shape, device, layout or slots, a tensor that requires a gradient while gradients are enabled, or an
            implementation that cannot run here.
        TypeError: wrong dtype or type.
    """
    tensors = q, k, v, position_ids, inv_freq, key_cache, value_cache, slots, q_norm_weight, k_norm_weight
    options = eps, tuple(mrope_section) if isinstance(mrope_section, list) else mrope_section
    key = call_key("rope_3d_to_cache", impl, options, *tensors)
    if run := find(key):
        return run(*tensors)
    check_impl(impl, "rope_3d_to_cache")
    check_rope_3d(q, k, position_ids, inv_freq, mrope_section, q_norm_weight, k_norm_weight, eps)
    check_tensor("v", v, tuple(k.shape), (k.dtype,), q)
    check_last_axis("v", v)
    check_tensor("key_cache", key_cache, ("B", "M", *k.shape[1:]), (k.dtype,), q)
    check_tensor("value_cache", value_cache, tuple(key_cache.shape), (k.dtype,), q)
    check_tensor("slots", slots, ("S",), (torch.int64,), q)
    if q.shape[0] != key_cache.shape[0] * slots.shape[0]:
        wanted = f"{key_cache.shape[0]} sequences of key_cache x {slots.shape[0]} slots"
        raise ValueError(f"q must have the tokens of {wanted}, got {q.shape[0]} tokens")
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if not cache.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {list(cache.stride())}")
    if torch.is_grad_enabled():
        differentiable = {"q": q, "k": k, "v": v, "key_cache": key_cache, "value_cache": value_cache}
        for name, x in {**differentiable, "q_norm_weight": q_norm_weight, "k_norm_weight": k_norm_weight}.items():
            if x is not None and x.requires_grad:
                raise ValueError(
                    f"{name} must not require a gradient: rope_3d_to_cache has none; use rope_3d, or torch.no_grad()"
                )
    if key is not None and resolve(impl, "rope_3d_to_cache", q.device, torch.promote_types(q.dtype, k.dtype)) == "triton":
        from keye_kernels.triton.rope import prepare_to_cache

        has_norm = q_norm_weight is not None
        prepared = prepare_to_cache(q, k, v, position_ids, inv_freq, mrope_section, key_cache, slots, has_norm, eps)
        return remember(key, prepared)(*tensors)
    return call(_rope_to_cache_op, *tensors[:5], list(mrope_section), *tensors[5:], eps, impl)


def _run(
    q, k, v, position_ids, inv_freq, sections, key_cache, value_cache, slots, q_norm_weight, k_norm_weight, eps, impl
):  # fmt: skip
    check_indices("slots", slots, key_cache.shape[1])
    rotation, options = (position_ids, inv_freq, sections), (q_norm_weight, k_norm_weight, eps)
    if resolve(impl, "rope_3d_to_cache", q.device, torch.promote_types(q.dtype, k.dtype)) == "reference":
        if q.device.type != "cpu":
            return reference.rope_to_cache(q, k, v, *rotation, key_cache, value_cache, slots, *options)
        q_out, k_out = cpu.rope(q, k, *rotation, *options, False)
        for new, cache in ((k_out, key_cache), (v, value_cache)):
            reference.write_slots(new, cache, slots)
        return q_out
    from keye_kernels.triton.rope import rope_to_cache

    q_in, k_in, v_in, *caches = kernel_inputs(q, k, v, key_cache, value_cache)
    q_out = rope_to_cache(q_in, k_in, v_in, *rotation, *caches, slots, *options)
    for cache, converted in zip((key_cache, value_cache), caches, strict=True):
        if converted is not cache:
            cache.copy_(converted)
    return q_out.to(q.dtype)


def _fake(
    q, k, v, position_ids, inv_freq, sections, key_cache, value_cache, slots, q_norm_weight, k_norm_weight, eps, impl
):  # fmt: skip
    return q.new_empty(q.shape)


define(
    "rope_to_cache",
    "Tensor q, Tensor k, Tensor v, Tensor position_ids, Tensor inv_freq, int[] sections, Tensor(a!) key_cache, "
    "Tensor(b!) value_cache, Tensor slots, Tensor? q_norm_weight, Tensor? k_norm_weight, float eps, str impl",
    "Tensor", _run, _fake,
)  # fmt: skip
_rope_to_cache_op = torch.ops.keye_kernels.rope_to_cache.default
