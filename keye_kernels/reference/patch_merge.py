"""The projector: LayerNorm, 2x2 patch merge and a two-layer MLP with exact GELU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import linear
from .rope import compute_dtype


def patch_merge_projection(
    features: Tensor,
    merge_index: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    linear_1_weight: Tensor,
    linear_1_bias: Tensor,
    linear_2_weight: Tensor,
    linear_2_bias: Tensor,
    merge_size: int = 2,
    eps: float = 1e-5,
) -> Tensor:
    """linear_2(gelu(linear_1(merged))), where `merged` joins the vectors of each merge_size x merge_size block.

    Args:
        features: [T, C].
        merge_index: [T/merge_size², merge_size²] integers, the rows that each output row joins; None where they lie side by side.
        norm_weight, norm_bias: of C, to normalise each patch first (Preview), or of merge_size² C, after the merge (1.5).
        linear_1_weight: [hidden, merge_size² C]; linear_2_weight: [out, hidden].

    Returns: [T/merge_size², out]. Source: specification of 1.5, section 5, and of Preview, section 4.
    """
    width = merge_size**2 * features.shape[1]
    before_merge = norm_weight.shape[0] == features.shape[1]
    if before_merge:
        features = _layer_norm(features, norm_weight, norm_bias, eps)
    merged = features.view(-1, width) if merge_index is None else features[merge_index].view(-1, width)
    if not before_merge:
        merged = _layer_norm(merged, norm_weight, norm_bias, eps)
    return linear(F.gelu(linear(merged, linear_1_weight, linear_1_bias)), linear_2_weight, linear_2_bias)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if x.dtype == weight.dtype:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    dtype = torch.promote_types(compute_dtype(x), weight.dtype)
    return F.layer_norm(x.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), eps).to(x.dtype)
