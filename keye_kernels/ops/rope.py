"""Rotary position embedding: 3D for the text model (with its q/k norm), 2D for the vision tower.

Symbols: T tokens, Hq query heads, Hk key heads, D head dim, P = D/2 pairs (channel i is rotated with channel i + P).
"""

import torch
from torch import Tensor

from keye_kernels import reference

from . import cpu
from .checks import FLOATS, INTEGERS, check_eps, check_heads, check_tensor
from .implementation import check_impl, kernel_inputs, resolve
from .prepared import call_key, find, remember
from .registry import NAMESPACE, call, define, gradients, library


def rope_3d(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    inv_freq: Tensor,
    mrope_section: list[int] | tuple[int, ...],
    *,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Multimodal rope of the decoder, optionally after an RMSNorm of every head.

    Source of the maths: docs/models/keye_vl_1_5.md, "3D position ids"; M-RoPE is from Qwen2-VL (arXiv:2409.12191). Computed in
    float32 and rounded once.

    Args:
        q: [T, Hq, D], any token and head stride, last axis contiguous. Not modified.
        k: [T, Hk, D], likewise.
        position_ids: [3, T] int32 or int64: time, height and width of each token.
        inv_freq: [P] float32 inverse frequencies. An angle is the float32 product of position and frequency.
        mrope_section: how many pairs take their position from time, height and width, in this order; the sum is P.
        q_norm_weight: [D], weight of an RMSNorm of each head of q before the rotation.
        k_norm_weight: [D], likewise for k; both or neither.
        eps: of the RMSNorm.
        impl: "auto", "reference" or "triton".

    Returns:
        Rotated copies of q and k, contiguous, in their dtypes.

    Raises:
        ValueError: wrong shape, device or layout, or an implementation that cannot run here.
        TypeError: wrong dtype or type.
    """
    tensors = q, k, position_ids, inv_freq, q_norm_weight, k_norm_weight
    options = eps, tuple(mrope_section) if isinstance(mrope_section, list) else mrope_section
    key = call_key("rope_3d", impl, options, *tensors)
    if run := find(key):
        return run(*tensors)
    check_impl(impl, "rope_3d")
    check_rope_3d(q, k, position_ids, inv_freq, mrope_section, q_norm_weight, k_norm_weight, eps)
    return _call(key, q, k, position_ids, inv_freq, mrope_section, q_norm_weight, k_norm_weight, eps, impl)


def rope_2d(q: Tensor, k: Tensor, position_ids: Tensor, inv_freq: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Rope of the vision tower: the first half of the pairs is rotated by the row, the second half by the column.

    Source of the maths: docs/models/keye_vl_1_5.md, "Vision tower". Computed in float32 and rounded once.

    Args:
        q: [T, Hq, D], D divisible by 4, any token and head stride, last axis contiguous. Not modified.
        k: [T, Hk, D], likewise.
        position_ids: [2, T] int32 or int64: row and column of each patch.
        inv_freq: [D/4] float32 inverse frequencies, used for rows and columns alike.
        impl: "auto", "reference" or "triton".

    Returns:
        Rotated copies of q and k, contiguous, in their dtypes.

    Raises:
        ValueError: wrong shape, device or layout, or an implementation that cannot run here.
        TypeError: wrong dtype or type.
    """
    key = call_key("rope_2d", impl, (), q, k, position_ids, inv_freq)
    if run := find(key):
        return run(q, k, position_ids, inv_freq)
    check_impl(impl, "rope_2d")
    _check(q, k, position_ids, inv_freq, axes=2, channels_per_frequency=4)
    if q.shape[-1] % 4:
        raise ValueError(f"q must have a head dim divisible by 4, got {q.shape[-1]}")
    return _call(key, q, k, position_ids, inv_freq, [q.shape[-1] // 4] * 2, None, None, 0.0, impl)


def _call(key, q, k, position_ids, inv_freq, sections, q_norm_weight, k_norm_weight, eps, impl):
    """A checked call. It is prepared for the next one with the same key, if a kernel runs it and nothing else is needed."""
    if key is None or resolve(impl, key[0], q.device, q.dtype) == "reference":
        return call(_rope_op, q, k, position_ids, inv_freq, list(sections), q_norm_weight, k_norm_weight, eps, False, impl)
    from keye_kernels.triton.rope import prepare

    run = remember(key, prepare(q, k, position_ids, inv_freq, sections, q_norm_weight is not None, eps))
    return run(q, k, position_ids, inv_freq, q_norm_weight, k_norm_weight)


def check_rope_3d(
    q: Tensor, k: Tensor, position_ids: Tensor, inv_freq: Tensor, mrope_section: list[int] | tuple[int, ...],
    q_norm_weight: Tensor | None, k_norm_weight: Tensor | None, eps: float,
) -> None:  # fmt: skip
    _check(q, k, position_ids, inv_freq, axes=3, channels_per_frequency=2)
    check_eps(eps)
    if not isinstance(mrope_section, list | tuple) or any(type(pairs) is not int for pairs in mrope_section):
        raise TypeError(f"mrope_section must be a list of three integers, got {mrope_section!r}")
    if len(mrope_section) != 3 or sum(mrope_section) != q.shape[-1] // 2 or min(mrope_section) < 0:
        raise ValueError(f"mrope_section must be three numbers adding up to D/2 = {q.shape[-1] // 2}, got {list(mrope_section)}")
    if (q_norm_weight is None) != (k_norm_weight is None):
        missing = "q_norm_weight" if q_norm_weight is None else "k_norm_weight"
        raise ValueError(f"{missing} must be given when the other norm weight is, got None")
    if q_norm_weight is not None and k_norm_weight is not None:
        check_tensor("q_norm_weight", q_norm_weight, (q.shape[-1],), FLOATS, q)
        check_tensor("k_norm_weight", k_norm_weight, (q.shape[-1],), FLOATS, q)


def _check(q: Tensor, k: Tensor, position_ids: Tensor, inv_freq: Tensor, axes: int, channels_per_frequency: int) -> None:
    check_heads("q", q)
    check_heads("k", k, like=q)
    if q.shape[-1] % 2 or q.shape[-1] == 0:
        raise ValueError(f"q must have a positive even head dim, got {q.shape[-1]}")
    check_tensor("position_ids", position_ids, (axes, q.shape[0]), INTEGERS, q)
    check_tensor("inv_freq", inv_freq, (q.shape[-1] // channels_per_frequency,), (torch.float32,), q)
    if inv_freq.requires_grad:
        raise ValueError("inv_freq must not require a gradient: rope has gradients for q, k and the norm weights only")


def _run(q, k, position_ids, inv_freq, sections, q_norm_weight, k_norm_weight, eps, conjugate, impl):
    operator = "rope_3d" if len(sections) == 3 else "rope_2d"
    options = position_ids, inv_freq, sections, q_norm_weight, k_norm_weight, eps, conjugate
    if resolve(impl, operator, q.device, q.dtype) == "reference":
        return (cpu if q.device.type == "cpu" else reference).rope(q, k, *options)
    from keye_kernels.triton.rope import rope

    q_out, k_out = rope(*kernel_inputs(q, k), *options)
    return q_out.to(q.dtype), k_out.to(k.dtype)


def _fake(q, k, position_ids, inv_freq, sections, q_norm_weight, k_norm_weight, eps, conjugate, impl):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _run_norm_backward(grad_q, grad_k, q, k, position_ids, inv_freq, sections, q_norm_weight, k_norm_weight, eps, impl):
    """Rotates the gradients back, then differentiates the norm."""
    grad_q, grad_k = _run(grad_q, grad_k, position_ids, inv_freq, sections, None, None, eps, True, impl)
    return _norm_gradients(grad_q, grad_k, q, k, q_norm_weight, k_norm_weight, eps)


def _norm_gradients(grad_q, grad_k, q, k, q_norm_weight, k_norm_weight, eps, create_graph=False):
    """Of q, k and their weights; `grad_q` and `grad_k` are those of the normalized heads."""
    of_q = gradients(reference.rms_norm, [q, q_norm_weight, eps], [0, 1], [grad_q], create_graph)
    of_k = gradients(reference.rms_norm, [k, k_norm_weight, eps], [0, 1], [grad_k], create_graph)
    return of_q[0], of_k[0], of_q[1], of_k[1]


def _fake_norm_backward(grad_q, grad_k, q, k, position_ids, inv_freq, sections, q_norm_weight, k_norm_weight, eps, impl):
    return q.new_empty(q.shape), k.new_empty(k.shape), torch.empty_like(q_norm_weight), torch.empty_like(k_norm_weight)


def _setup_context(ctx, inputs, output):
    q, k, position_ids, inv_freq, ctx.sections, q_norm_weight, k_norm_weight, ctx.eps, ctx.conjugate, ctx.impl = inputs
    ctx.save_for_backward(position_ids, inv_freq, *(() if q_norm_weight is None else (q, k, q_norm_weight, k_norm_weight)))


def _backward(ctx, grad_q, grad_k):
    position_ids, inv_freq, *normed = ctx.saved_tensors
    grad_q, grad_k = grad_q.contiguous(), grad_k.contiguous()
    weights = None, None
    rotation = position_ids, inv_freq, ctx.sections
    if normed and not torch.is_grad_enabled():
        grad_q, grad_k, *weights = _norm_backward_op(grad_q, grad_k, *normed[:2], *rotation, *normed[2:], ctx.eps, ctx.impl)
    else:
        grad_q, grad_k = _rope_op(grad_q, grad_k, *rotation, None, None, ctx.eps, not ctx.conjugate, ctx.impl)
        if normed:  # create_graph=True
            grad_q, grad_k, *weights = _norm_gradients(grad_q, grad_k, *normed, ctx.eps, create_graph=True)
    return grad_q, grad_k, None, None, None, *weights, None, None, None


_POSITIONS = "Tensor position_ids, Tensor inv_freq, int[] sections"
define(
    "rope",
    f"Tensor q, Tensor k, {_POSITIONS}, Tensor? q_norm_weight, Tensor? k_norm_weight, float eps, bool conjugate, str impl",
    "(Tensor, Tensor)", _run, _fake,
)  # fmt: skip
define(
    "rope_norm_backward",
    f"Tensor grad_q, Tensor grad_k, Tensor q, Tensor k, {_POSITIONS}, "
    "Tensor q_norm_weight, Tensor k_norm_weight, float eps, str impl",
    "(Tensor, Tensor, Tensor, Tensor)", _run_norm_backward, _fake_norm_backward,
)  # fmt: skip
torch.library.register_autograd(f"{NAMESPACE}::rope", _backward, setup_context=_setup_context, lib=library)
_rope_op = torch.ops.keye_kernels.rope.default
_norm_backward_op = torch.ops.keye_kernels.rope_norm_backward.default
