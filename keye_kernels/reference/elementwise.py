"""What stands between the matmuls of a layer: residual add with the norm after it, and the gate of the decoder's MLP."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .rope import compute_dtype


def add_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(sum, norm of the sum) of x and residual [T, C]: a LayerNorm with a bias [C], an RMSNorm without. The sum is rounded first.

    Source of the maths: docs/models/keye_vl_1_5.md, "Vision tower" (LayerNorm) and "Text model" (RMSNorm).
    """
    total = x if residual is None else residual + x
    wide = total.to(torch.promote_types(compute_dtype(x), weight.dtype))
    if bias is None:
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)
    else:
        normed = F.layer_norm(wide, weight.shape, weight.to(wide.dtype), bias.to(wide.dtype), eps)
    return total, normed.to(x.dtype)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up for gate and up [T, C]. Source of the maths: docs/models/keye_vl_1_5.md, "Text model"."""
    wide = compute_dtype(gate)
    return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)
