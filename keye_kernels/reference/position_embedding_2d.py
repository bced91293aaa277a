"""Learned 2D position embeddings, resized bilinearly to each image's grid and added to its patches."""

from torch import Tensor

from .rope import compute_dtype


def position_embedding_2d(features: Tensor, table: Tensor, corner_index: Tensor, corner_weight: Tensor) -> Tensor:
    """features [T, C] + Σ_c corner_weight[:, c] * table[corner_index[:, c]], in the dtype of `features`.

    table [side², C] is the learned square grid, row by row. corner_index and corner_weight, [T, 4], are the four table rows
    around each patch and their float32 weights. Source of the maths: docs/models/keye_vl_1_5.md, "Vision tower".
    """
    dtype = compute_dtype(features)
    total = features.to(dtype)
    for corner in range(4):
        total = total + table[corner_index[:, corner]].to(dtype) * corner_weight[:, corner, None].to(dtype)
    return total.to(features.dtype)
