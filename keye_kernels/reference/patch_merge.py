"""The projector: LayerNorm, 2x2 patch merge and a two-layer MLP with exact GELU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import linear
from .rope import compute_dtype


def patch_merge_projection(
    features: Tensor, merge_index: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, linear_1_weight: Tensor,
    linear_1_bias: Tensor, linear_2_weight: Tensor, linear_2_bias: Tensor, merge_size: int = 2, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """[T/m², out] = linear_2(gelu(linear_1(merged))), where `merged` joins the m x m blocks of features [T, C]; m is merge_size.

    merge_index: [T/m², m²] integers, the patches that each row joins; None where they are adjacent. The norm is of each patch
    where its weights are [C] (Preview), and of the merged row where they are [m² C] (1.5). The linear layers are [hidden, m² C]
    and [out, hidden]. Source of the maths: docs/models/keye_vl_1_5.md and docs/models/keye_vl_preview.md, "Projector".
    """
    width = merge_size**2 * features.shape[1]
    norm_before_merge = norm_weight.shape[0] == features.shape[1]
    if norm_before_merge:
        features = _layer_norm(features, norm_weight, norm_bias, eps)
    merged = features.view(-1, width) if merge_index is None else features[merge_index].view(-1, width)
    if not norm_before_merge:
        merged = _layer_norm(merged, norm_weight, norm_bias, eps)
    return linear(F.gelu(linear(merged, linear_1_weight, linear_1_bias)), linear_2_weight, linear_2_bias)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if x.dtype == weight.dtype == bias.dtype:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    dtype = torch.promote_types(torch.promote_types(compute_dtype(x), weight.dtype), bias.dtype)
    return F.layer_norm(x.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), eps).to(x.dtype)
