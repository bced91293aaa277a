"""Residual add with the norm after it, and the gate of the decoder's MLP. Symbols: T tokens or patches, C channels."""

import torch
from torch import Tensor

from keye_kernels import reference

from .checks import FLOATS, check_eps, check_last_axis, check_tensor
from .implementation import check_impl, kernel_inputs, resolve
from .prepared import call_key, find, remember
from .registry import call, define_differentiable


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """residual + x, rounded to their dtype, and its LayerNorm (with a bias) or RMSNorm (without), in one pass.

    Source of the maths: docs/models/keye_vl_1_5.md, "Vision tower" and "Text model". The norm is computed in float32 and rounded
    once.

    Args:
        x: [T, C], last axis contiguous. Not modified.
        residual: like `x`, in its dtype. Not modified. None: only the norm of `x`.
        weight: [C].
        bias: [C] for a LayerNorm; None for an RMSNorm.
        eps: added to the variance (RMSNorm: to the mean square).
        impl: "auto", "reference" or "triton".

    Returns:
        The sum [T, C] (without a residual: `x` itself) and the normalized sum [T, C], contiguous, in the dtype of `x`.

    Raises:
        ValueError: wrong shape, device or layout, or an implementation that cannot run here.
        TypeError: wrong dtype or type.
    """
    tensors = x, residual, weight, bias
    key = call_key("add_norm", impl, (eps,), *tensors)
    if run := find(key):
        return run(*tensors)
    check_impl(impl, "add_norm")
    check_tensor("x", x, ("T", "C"), FLOATS, x)
    check_last_axis("x", x)
    if x.shape[1] == 0:
        raise ValueError(f"x must have at least one channel, got shape {list(x.shape)}")
    if residual is not None:
        check_tensor("residual", residual, tuple(x.shape), (x.dtype,), x)
        check_last_axis("residual", residual)
    check_tensor("weight", weight, (x.shape[1],), FLOATS, x)
    if bias is not None:
        check_tensor("bias", bias, (x.shape[1],), FLOATS, x)
    check_eps(eps)
    if key is not None and resolve(impl, "add_norm", x.device, x.dtype) == "triton":
        from keye_kernels.triton.add_norm import prepare

        return remember(key, prepare(*tensors, eps))(*tensors)
    total, normed = call(_add_norm_op, *tensors, eps, impl)
    return x if residual is None else total, normed


def silu_mul(gate: Tensor, up: Tensor, *, impl: str = "auto") -> Tensor:
    """silu(gate) * up, the activation of the decoder's MLP.

    Source of the maths: docs/models/keye_vl_1_5.md, "Text model". Computed in float32 and rounded once.

    Args:
        gate: [T, C], last axis contiguous.
        up: like `gate`, in its dtype. Both may be halves of one tensor.
        impl: "auto", "reference" or "triton".

    Returns:
        [T, C], contiguous, in the dtype of `gate`.

    Raises:
        ValueError: wrong shape, device or layout, or an implementation that cannot run here.
        TypeError: wrong dtype or type.
    """
    key = call_key("silu_mul", impl, (), gate, up)
    if run := find(key):
        return run(gate, up)
    check_impl(impl, "silu_mul")
    check_tensor("gate", gate, ("T", "C"), FLOATS, gate)
    check_last_axis("gate", gate)
    check_tensor("up", up, tuple(gate.shape), (gate.dtype,), gate)
    check_last_axis("up", up)
    if key is not None and resolve(impl, "silu_mul", gate.device, gate.dtype) == "triton":
        from keye_kernels.triton.silu_mul import prepare

        return remember(key, prepare(gate, up))(gate, up)
    return call(_silu_mul_op, gate, up, impl)


def _run_add_norm(x, residual, weight, bias, eps, impl):
    if resolve(impl, "add_norm", x.device, x.dtype) == "triton":
        from keye_kernels.triton.add_norm import add_norm as run

        inputs = x, x if residual is None else residual, weight
        given, other, weight = kernel_inputs(*inputs)
        total, normed = run(given, None if residual is None else other, weight, bias, eps)
        total, normed = total.to(x.dtype), normed.to(x.dtype)
    else:
        total, normed = reference.add_norm(x, residual, weight, bias, eps)
    return _no_sum(x) if residual is None else total, normed


def _no_sum(x):
    """An operator must not return its input."""
    return x.new_empty(0, x.shape[1])


def _add_norm_reference(x, residual, weight, bias, eps, impl):
    total, normed = reference.add_norm(x, residual, weight, bias, eps)
    return _no_sum(x) if residual is None else total, normed


def _fake_add_norm(x, residual, weight, bias, eps, impl):
    return _no_sum(x) if residual is None else x.new_empty(x.shape), x.new_empty(x.shape)


def _run_silu_mul(gate, up, impl):
    if resolve(impl, "silu_mul", gate.device, gate.dtype) == "triton":
        from keye_kernels.triton.silu_mul import silu_mul as run

        return run(*kernel_inputs(gate, up)).to(gate.dtype)
    return reference.silu_mul(gate, up)


def _silu_mul_reference(gate, up, impl):
    return reference.silu_mul(gate, up)


def _fake_silu_mul(gate, up, impl):
    return gate.new_empty(gate.shape)


define_differentiable(
    "add_norm",
    "Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, str impl",
    "(Tensor, Tensor)",
    _run_add_norm, _fake_add_norm, _add_norm_reference, differentiable=[0, 1, 2, 3],
)  # fmt: skip
define_differentiable(
    "silu_mul", "Tensor gate, Tensor up, str impl", "Tensor",
    _run_silu_mul, _fake_silu_mul, _silu_mul_reference, differentiable=[0, 1],
)  # fmt: skip
_add_norm_op = torch.ops.keye_kernels.add_norm.default
_silu_mul_op = torch.ops.keye_kernels.silu_mul.default
