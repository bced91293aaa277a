"""Learned 2D position embeddings as one operator. Symbols: n images, T patches, C channels."""

import torch
from torch import Tensor

from keye_kernels import reference
from keye_kernels.geometry import VisionBatch, check_grid_thw, patch_tensors

from . import cpu
from .checks import FLOATS, INTEGERS, check_indices, check_int32_offsets, check_last_axis, check_tensor
from .implementation import check_impl, kernel_inputs, resolve
from .prepared import call_key, find, remember
from .registry import call, define_differentiable


def position_embedding_2d(features: Tensor, table: Tensor, grid_thw: Tensor | VisionBatch, *, impl: str = "auto") -> Tensor:
    """Adds the learned position embeddings, resized bilinearly to each image's grid (align_corners=False, no antialias).

    Source of the maths: docs/models/keye_vl_1_5.md, "Vision tower". Computed in float32 and rounded once.

    Args:
        features: [T, C] in raster order (frame by frame, row by row), last axis contiguous. Not modified.
        table: [side², C], the learned square grid, row by row.
        grid_thw: [n, 3] integers on the host: frames, patch rows and patch columns of each image. Or the `VisionBatch` built
            from it: the features are then in its order.
        impl: "auto", "reference" or "triton".

    Returns:
        [T, C] in the dtype of `features`.

    Raises:
        ValueError: wrong shape, device or layout, or an implementation that cannot run here.
        TypeError: wrong dtype or type.
    """
    key = None
    if isinstance(grid_thw, VisionBatch):
        index, weight = grid_thw.corner_index, grid_thw.corner_weight
        key = call_key("position_embedding_2d", impl, (grid_thw.table_side,), features, table, index, weight)
        if run := find(key):
            return run(features, table, index, weight)
    check_impl(impl, "position_embedding_2d")
    check_tensor("features", features, ("T", "C"), FLOATS, features)
    check_last_axis("features", features)
    check_tensor("table", table, ("side²", features.shape[1]), FLOATS, features)
    check_int32_offsets("table", table)
    if isinstance(grid_thw, VisionBatch):
        if index.shape[0] != features.shape[0]:
            raise ValueError(f"grid_thw describes {index.shape[0]} patches, but features has {features.shape[0]} rows")
        check_tensor("corner_index", index, (index.shape[0], 4), INTEGERS, features)
        check_tensor("corner_weight", weight, (index.shape[0], 4), (torch.float32,), features)
        if table.shape[0] != (side := grid_thw.table_side) ** 2:
            found = table.shape[0]
            raise ValueError(f"table must have {side**2} rows, because the VisionBatch has table_side={side}, got {found} rows")
    else:
        side = round(table.shape[0] ** 0.5)
        if side == 0 or side * side != table.shape[0]:
            raise ValueError(f"table must be a square grid of position embeddings, got {table.shape[0]} rows")
        grids = check_grid_thw(grid_thw, features.shape[0], 1)
        index, weight = (t.to(features.device) for t in patch_tensors(grids, side, 1, "raster")[1:3])
    if key is not None and resolve(impl, "position_embedding_2d", features.device, features.dtype) == "triton":
        from keye_kernels.triton.position_embedding_2d import prepare

        return remember(key, prepare(features, table))(features, table, index, weight)
    return call(_position_op, features, table, index, weight, impl)


def _run(features, table, corner_index, corner_weight, impl):
    if resolve(impl, "position_embedding_2d", features.device, features.dtype) == "triton":
        from keye_kernels.triton.position_embedding_2d import position_embedding_2d as run

        check_indices("corner_index", corner_index, table.shape[0])
        return run(*kernel_inputs(features, table), corner_index, corner_weight).to(features.dtype)
    run = (cpu if features.device.type == "cpu" else reference).position_embedding_2d
    return run(features, table, corner_index, corner_weight)


def _reference(features, table, corner_index, corner_weight, impl):
    return reference.position_embedding_2d(features, table, corner_index, corner_weight)


def _fake(features, table, corner_index, corner_weight, impl):
    return features.new_empty(features.shape)


define_differentiable(
    "position_embedding_2d",
    "Tensor features, Tensor table, Tensor corner_index, Tensor corner_weight, str impl",
    "Tensor",
    _run, _fake, _reference, differentiable=[0, 1],
)  # fmt: skip
_position_op = torch.ops.keye_kernels.position_embedding_2d.default
