"""Learned 2D positions, resized bilinearly to each picture's grid and added to its patches."""

from torch import Tensor

from .rope import compute_dtype


def position_embedding_2d(features: Tensor, table: Tensor, corner_index: Tensor, corner_weight: Tensor) -> Tensor:
    """features + Σ_c corner_weight[:, c] * table[corner_index[:, c]].

    Args:
        features: [T, C].
        table: [side², C], the learned square grid, row by row.
        corner_index: [T, 4] integers, the four table rows around each patch; corner_weight: [T, 4] float32, adding up to 1.

    Returns: [T, C] in the dtype of `features`. Source: specification of 1.5, section 4.2.
    """
    dtype = compute_dtype(features)
    total = features.to(dtype)
    for corner in range(4):
        total = total + table[corner_index[:, corner]].to(dtype) * corner_weight[:, corner, None].to(dtype)
    return total.to(features.dtype)
