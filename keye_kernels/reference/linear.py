"""Linear layer. In float32 on a CPU it uses the fastest of torch's matmul implementations."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .rope import compute_dtype

# Below this, the call overhead of oneDNN or of a split GEMV is larger than the gain
MIN_MULTIPLY_ADDS = 1 << 20
MAX_GEMV_PARTS = 32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `F.linear`: x [..., in] and weight [out, in] to [..., out].

    On a CPU in float32 without gradients, a GEMV is split over parts of the weight (torch runs a GEMV on one core), and other
    matmuls run in oneDNN instead of BLAS: MKL uses its widest vectors on Intel processors only, and splits few rows badly.
    """
    if not uses_cpu_matmul(x, weight, bias) or not weight.is_contiguous() or x.numel() * weight.shape[0] < MIN_MULTIPLY_ADDS:
        return F.linear(x, weight, bias)
    if x.numel() == weight.shape[1] <= weight.shape[0]:
        return _split_gemv(x, weight, bias)
    if torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def linear_few_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, silu_mul: bool
) -> Tensor:  # fmt: skip
    """linear(x [T, in]) + residual [T, out]; with `silu_mul`, silu(gate) * up of the halves of the linear layer, in its place."""
    wide = compute_dtype(x)
    if not silu_mul and residual is None:
        return linear(x, weight, bias)
    out = linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    if silu_mul:
        gate, up = out.chunk(2, dim=1)
        out = F.silu(gate) * up
    return (out if residual is None else out + residual).to(x.dtype)


def uses_cpu_matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether these are plain float32 CPU tensors, with neither gradients nor autocast."""
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    tensors = [tensor for tensor in (x, weight, bias) if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    # Tensor subclasses (sharded, quantized) define their own F.linear
    return all(t.dtype == torch.float32 and type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


def _split_gemv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out, width = weight.shape
    parts = math.gcd(out, MAX_GEMV_PARTS)
    # Strides (1, width), not (1, 1): with the latter, BLAS is called with a transposed weight, which is five times slower
    column = x.reshape(1, width).t().expand(parts, width, 1)
    row = torch.bmm(weight.view(parts, out // parts, width), column).view(*x.shape[:-1], out)
    return row if bias is None else row + bias
