"""The projector as one operator. Symbols: n images, T patches, C channels of a patch, m merge size."""

from functools import partial

import torch
from torch import Tensor

from keye_kernels import reference
from keye_kernels.geometry import VisionBatch, check_grid_thw, patch_tensors

from .checks import FLOATS, INTEGERS, check_eps, check_indices, check_int32_offsets, check_last_axis, check_tensor
from .implementation import check_impl, is_auto, kernel_inputs, resolve
from .prepared import call_key, find, remember
from .registry import call, define_differentiable


def patch_merge_projection(
    features: Tensor,
    grid_thw: Tensor | VisionBatch,
    norm_weight: Tensor,
    norm_bias: Tensor,
    linear_1_weight: Tensor,
    linear_1_bias: Tensor,
    linear_2_weight: Tensor,
    linear_2_bias: Tensor,
    *,
    merge_size: int = 2,
    eps: float = 1e-5,
    impl: str = "auto",
) -> Tensor:
    """The projector: LayerNorm, merge of m x m patches, linear, exact GELU, linear; for all images at once.

    Source of the maths: docs/models/keye_vl_1_5.md and docs/models/keye_vl_preview.md, "Projector".

    Args:
        features: [T, C] in raster order (frame by frame, row by row), last axis contiguous.
        grid_thw: [n, 3] integers on the host: frames, patch rows and patch columns of each image. Or the `VisionBatch` built
            from it: the features are then in its order.
        norm_weight: [C] to normalize each patch before the merge (Preview), or [m² C] after it (1.5).
        norm_bias: like `norm_weight`.
        linear_1_weight: [hidden, m² C]. The linear layers have the dtype of `features`.
        linear_1_bias: [hidden].
        linear_2_weight: [out, hidden].
        linear_2_bias: [out].
        merge_size: m.
        eps: of the LayerNorm.
        impl: "auto", "reference", "triton" (LayerNorm, merge and matmuls in Triton), or "torch" (LayerNorm and merge in one
            Triton kernel, matmuls by cuBLAS or hipBLAS). On a GPU "auto" takes the matmuls from a timed table, or else "torch".

    Returns:
        [T/m², out] in the dtype of `features`; rows are ordered by image, frame, row and column of the merged grid.

    Raises:
        ValueError: wrong shape, device or layout, or an implementation that cannot run here.
        TypeError: wrong dtype or type.
    """
    weights = norm_weight, norm_bias, linear_1_weight, linear_1_bias, linear_2_weight, linear_2_bias
    key = None
    is_plain = isinstance(features, Tensor) and not torch.is_autocast_enabled(features.device.type)
    if isinstance(grid_thw, VisionBatch) and is_plain:
        options = merge_size, eps, grid_thw.merge_size, grid_thw.raster_index.shape
        key = call_key("patch_merge_projection", impl, options, features, grid_thw.merge_index, *weights)
        if run := find(key):
            return run(features, grid_thw.merge_index, *weights)
    check_impl(impl, "patch_merge_projection")
    check_tensor("features", features, ("T", "C"), FLOATS, features)
    check_last_axis("features", features)
    check_eps(eps)
    if isinstance(merge_size, bool) or not isinstance(merge_size, int) or merge_size < 1:
        raise ValueError(f"merge_size must be a positive int, got {merge_size!r}")
    if (channels := features.shape[1]) == 0:
        raise ValueError(f"features must have at least one channel, got shape {list(features.shape)}")
    width = merge_size**2 * channels
    check_tensor("norm_weight", norm_weight, ("C or 4C",), FLOATS, features)
    if norm_weight.shape[0] not in (channels, width):
        raise ValueError(f"norm_weight must have shape [{channels}] or [{width}], got {list(norm_weight.shape)}")
    check_tensor("norm_bias", norm_bias, tuple(norm_weight.shape), FLOATS, features)
    # Autocast casts the inputs of a linear layer
    dtypes = FLOATS if torch.is_autocast_enabled(features.device.type) else (features.dtype,)
    check_tensor("linear_1_weight", linear_1_weight, ("hidden", width), dtypes, features)
    check_tensor("linear_1_bias", linear_1_bias, (linear_1_weight.shape[0],), dtypes, features)
    check_tensor("linear_2_weight", linear_2_weight, ("out", linear_1_weight.shape[0]), dtypes, features)
    check_tensor("linear_2_bias", linear_2_bias, (linear_2_weight.shape[0],), dtypes, features)
    check_int32_offsets("linear_1_weight", linear_1_weight)
    check_int32_offsets("linear_2_weight", linear_2_weight)
    if isinstance(grid_thw, VisionBatch):
        if grid_thw.merge_size != merge_size:
            raise ValueError(f"merge_size must be {grid_thw.merge_size} as in the VisionBatch, got {merge_size}")
        merge_index = grid_thw.merge_index
        if (patches := grid_thw.raster_index.shape[0]) != features.shape[0]:
            raise ValueError(f"grid_thw describes {patches} patches, but features has {features.shape[0]} rows")
        if merge_index is not None:
            check_tensor("merge_index", merge_index, (patches // merge_size**2, merge_size**2), INTEGERS, features)
    else:
        grids = check_grid_thw(grid_thw, features.shape[0], merge_size)
        merge_index = patch_tensors(grids, 1, merge_size, "raster")[-1].to(features.device)
    if key is not None and resolve(impl, "patch_merge_projection", features.device, features.dtype) != "reference":
        remember(key, partial(_run_triton, merge_size=merge_size, eps=eps, impl=impl))
    return call(_projection_op, features, merge_index, *weights, merge_size, eps, impl)


def _run(features, merge_index, nw, nb, w1, b1, w2, b2, merge_size, eps, impl):
    if resolve(impl, "patch_merge_projection", features.device, features.dtype) == "reference":
        return _reference(features, merge_index, nw, nb, w1, b1, w2, b2, merge_size, eps, impl)
    return _run_triton(features, merge_index, nw, nb, w1, b1, w2, b2, merge_size, eps, impl)


def _run_triton(features, merge_index, nw, nb, w1, b1, w2, b2, merge_size, eps, impl):
    """LayerNorm and merge as a Triton kernel; `impl` runs the matmuls."""
    from keye_kernels.triton.patch_merge import patch_merge_projection as run

    automatic = is_auto(impl, "patch_merge_projection")
    backend = "auto" if automatic else resolve(impl, "patch_merge_projection", features.device, features.dtype)
    if merge_index is not None:
        check_indices("merge_index", merge_index, features.shape[0])
    inputs, *weights = kernel_inputs(features, *(weight.contiguous() for weight in (nw, nb, w1, b1, w2, b2)))
    return run(inputs, merge_index, *weights, merge_size, eps, backend).to(features.dtype)


def _reference(features, merge_index, nw, nb, w1, b1, w2, b2, merge_size, eps, impl):
    return reference.patch_merge_projection(features, merge_index, nw, nb, w1, b1, w2, b2, merge_size, eps)


def _fake(features, merge_index, nw, nb, w1, b1, w2, b2, merge_size, eps, impl):
    return features.new_empty(features.shape[0] // merge_size**2, w2.shape[0])


define_differentiable(
    "patch_merge_projection",
    "Tensor features, Tensor? merge_index, Tensor norm_weight, Tensor norm_bias, Tensor linear_1_weight, Tensor linear_1_bias, "
    "Tensor linear_2_weight, Tensor linear_2_bias, int merge_size, float eps, str impl",
    "Tensor",
    _run, _fake, _reference, differentiable=[0, 2, 3, 4, 5, 6, 7],
)  # fmt: skip
_projection_op = torch.ops.keye_kernels.patch_merge_projection.default
