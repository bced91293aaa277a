"""The model's linear layers. In a graph compiled for a CPU they are one operator: Inductor would call BLAS, which is slower."""

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from keye_kernels.reference.linear import linear as reference_linear
from keye_kernels.reference.linear import uses_cpu_matmul

from .registry import define


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] and weight [out, in] to [..., out], as `torch.nn.functional.linear`. Arguments are not checked."""
    if not torch.compiler.is_compiling():
        return reference_linear(x, weight, bias)
    return (_linear_op if uses_cpu_matmul(x, weight, bias) else torch_linear)(x, weight, bias)


def _run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return reference_linear(x, weight, bias)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


define("linear", "Tensor x, Tensor weight, Tensor? bias", "Tensor", _run, _fake)
_linear_op = torch.ops.keye_kernels.linear.default
