"""Linear layer of few rows, as in a decoding step. Symbols: T rows, at most 16."""

import torch
from torch import Tensor

from keye_kernels import reference
from keye_kernels.triton.linear_few_rows_cases import MAX_ROWS

from .checks import FLOATS, check_last_axis, check_tensor
from .implementation import check_impl, is_auto, kernel_inputs, resolve
from .prepared import call_key, find, remember
from .registry import call, define_differentiable


def linear_few_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    silu_mul: bool = False,
    impl: str = "auto",
) -> Tensor:
    """x @ weightᵀ + bias + residual for at most 16 rows, optionally with the gate of the decoder's MLP, in one launch.

    Source of the maths: docs/models/keye_vl_1_5.md, "Text model". The kernel computes in float32 and rounds once.

    Args:
        x: [T, in] with T <= 16, last axis contiguous.
        weight: [out, in] in the dtype of `x`. With `silu_mul`, [2·out, in]: the rows of the gate, then those of up.
        bias: [rows of `weight`] in the dtype of `x`.
        residual: [T, out] in the dtype of `x`, added last. Not modified.
        silu_mul: silu(gate) * up instead of the output of the linear layer.
        impl: "auto", "reference", "triton" or "torch" (torch's matmul, followed by a kernel for `silu_mul`). On a GPU, "auto"
            is "torch" except where `keye-kernels autotune` measured that "triton" is faster.

    Returns:
        [T, out], contiguous, in the dtype of `x`.

    Raises:
        ValueError: wrong shape, device or layout, more than 16 rows, or an implementation that cannot run here.
        TypeError: wrong dtype or type.
    """
    tensors = x, weight, bias, residual
    key = call_key("linear_few_rows", impl, (silu_mul,), *tensors)
    if run := find(key):
        return run(*tensors)
    check_impl(impl, "linear_few_rows")
    if not isinstance(silu_mul, bool):
        raise TypeError(f"silu_mul must be a bool, got {silu_mul!r}")
    check_tensor("x", x, ("T", "in"), FLOATS, x)
    check_last_axis("x", x)
    if x.shape[0] > MAX_ROWS or x.shape[1] == 0:
        raise ValueError(f"x must have at most {MAX_ROWS} rows and at least one column, got shape {list(x.shape)}")
    check_tensor("weight", weight, ("out", x.shape[1]), (x.dtype,), x)
    rows = weight.shape[0]
    if silu_mul and rows % 2:
        raise ValueError(f"weight must have an even number of rows with silu_mul, got shape {list(weight.shape)}")
    if bias is not None:
        check_tensor("bias", bias, (rows,), (x.dtype,), x)
    if residual is not None:
        check_tensor("residual", residual, (x.shape[0], rows // 2 if silu_mul else rows), (x.dtype,), x)
    if key is not None and (backend := _backend(x, impl)) != "reference":
        from keye_kernels.triton.linear_few_rows import prepare

        return remember(key, prepare(*tensors, silu_mul, backend))(*tensors)
    return call(_linear_op, *tensors, silu_mul, impl)


def prefers_triton(x: Tensor, weight: Tensor, silu_mul: bool) -> bool:
    """Whether impl="auto" runs the kernel on a GPU with Triton. Arguments are not checked."""
    from keye_kernels.triton.linear_few_rows import runs_in_triton

    rows, (columns, width) = x.shape[0], weight.shape
    return rows <= MAX_ROWS and weight.is_contiguous() and runs_in_triton(x.device, x.dtype, rows, (columns, width), silu_mul)


def _backend(x, impl):
    """The implementation; "auto" where the launch config chooses between Triton and torch."""
    resolved = resolve(impl, "linear_few_rows", x.device, x.dtype)
    return "auto" if resolved == "triton" and is_auto(impl, "linear_few_rows") else resolved


def _run(x, weight, bias, residual, silu_mul, impl):
    if (backend := _backend(x, impl)) == "reference":
        return reference.linear_few_rows(x, weight, bias, residual, silu_mul)
    from keye_kernels.triton.linear_few_rows import linear_few_rows as run

    extras = [None if extra is None else kernel_inputs(extra)[0] for extra in (bias, residual)]
    return run(*kernel_inputs(x, weight), *extras, silu_mul, backend).to(x.dtype)


def _reference(x, weight, bias, residual, silu_mul, impl):
    return reference.linear_few_rows(x, weight, bias, residual, silu_mul)


def _fake(x, weight, bias, residual, silu_mul, impl):
    return x.new_empty(x.shape[0], weight.shape[0] // 2 if silu_mul else weight.shape[0])


define_differentiable(
    "linear_few_rows",
    "Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool silu_mul, str impl",
    "Tensor",
    _run, _fake, _reference, differentiable=[0, 1, 2, 3],
)  # fmt: skip
_linear_op = torch.ops.keye_kernels.linear_few_rows.default
