"""x weightᵀ + bias, on a CPU by whichever of torch's ways through a float32 product is the fastest."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Fewer multiplies than this are done before a product by oneDNN, or by parts, has begun
LEAST_MULTIPLIES = 1 << 20
MOST_PARTS = 32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `F.linear`: x [..., in] and weight [out, in] to [..., out].

    In float32 on a CPU, and where no gradient is wanted, one row is multiplied by the parts of a tall weight side by side
    (torch's matrix-vector product runs on one core), and all else by oneDNN in place of BLAS: MKL uses the widest vectors on
    Intel's processors only, and shares few rows badly among cores.
    """
    if not has_other_ways(x, weight, bias):
        return F.linear(x, weight, bias)
    if x.numel() * weight.shape[0] < LEAST_MULTIPLIES or not weight.is_contiguous():
        return F.linear(x, weight, bias)
    if x.numel() == weight.shape[1] <= weight.shape[0]:
        return _one_row(x, weight, bias)
    if torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def has_other_ways(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether these are plain float32 tensors of a CPU, of which neither a gradient nor autocast wants anything."""
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    tensors = [tensor for tensor in (x, weight, bias) if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    # Of a subclass, sharded or quantised, only its own F.linear knows what a product is
    return all(t.dtype == torch.float32 and type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


def _one_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out, width = weight.shape
    parts = math.gcd(out, MOST_PARTS)
    # A column whose stride is 1, too, would be multiplied five times as slowly: BLAS is then told of a transposed weight
    column = x.reshape(1, width).t().expand(parts, width, 1)
    row = torch.bmm(weight.view(parts, out // parts, width), column).view(*x.shape[:-1], out)
    return row if bias is None else row + bias
