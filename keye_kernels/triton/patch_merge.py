"""The projector: LayerNorm + 2x2 patch merge in one launch, then two linear layers with the exact GELU between them."""

from torch import Tensor

from .linear import linear
from .patch_merge_norm import patch_merge_norm


def patch_merge_projection(
    features: Tensor, merge_index: Tensor | None, norm_weight: Tensor, norm_bias: Tensor,
    linear_1_weight: Tensor, linear_1_bias: Tensor, linear_2_weight: Tensor, linear_2_bias: Tensor,
    merge_size: int = 2, eps: float = 1e-5, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """linear_2(gelu(linear_1(merge(norm(features))))); arguments and result as in `keye_kernels.reference`.

    Weights are contiguous, of any floating-point dtype; the matmuls round them to the dtype of the features.
    `backend` computes the matmuls: "triton", "torch" (cuBLAS or hipBLAS), or "auto": as a table or the heuristic says.
    """
    if features.shape[0] == 0:
        return features.new_empty(0, linear_2_weight.shape[0])
    merged = patch_merge_norm(features, merge_index, norm_weight, norm_bias, merge_size, eps)
    hidden = linear(merged, linear_1_weight, linear_1_bias, gelu=True, backend=backend)
    return linear(hidden, linear_2_weight, linear_2_bias, backend=backend)
