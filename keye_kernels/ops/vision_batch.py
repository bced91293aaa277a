"""Builds the geometry of a vision batch, in a compiled graph through an operator; see `keye_kernels.geometry`."""

import torch
from torch import Tensor

from keye_kernels.geometry import Order, VisionBatch, check_grid_thw, patch_tensors, segment_lengths
from keye_kernels.segments import Segments, cumulative_lengths

from .registry import define


def build_vision_batch(
    grid_thw: Tensor, num_patches: int, *, table_side: int, merge_size: int = 2, segment_by_frame: bool = False,
    order: Order = "block", device: torch.device,
) -> VisionBatch:  # fmt: skip
    """`VisionBatch.build`, also inside `torch.compile`.

    There the grids' values are unknown: the segments have no lengths on the host, T is the upper bound of max_seqlen, and with
    `segment_by_frame` empty segments pad the offsets to a size that follows from T.
    """
    if not torch.compiler.is_compiling():
        return VisionBatch.build(
            grid_thw, num_patches, table_side=table_side, merge_size=merge_size,
            segment_by_frame=segment_by_frame, order=order, device=device,
        )  # fmt: skip
    is_block = order == "block"
    sizes = num_patches, table_side, merge_size
    tensors = _geometry_op(grid_thw, *sizes, segment_by_frame, is_block, device)
    cu_seqlens, position_ids, corner_index, corner_weight, raster_index, merge_index = tensors
    return VisionBatch(
        Segments(cu_seqlens, num_patches), position_ids, corner_index, corner_weight, raster_index,
        None if is_block else merge_index, table_side, merge_size,
    )  # fmt: skip


def _run(grid_thw, num_patches, table_side, merge_size, segment_by_frame, block_order, device):
    grids = check_grid_thw(grid_thw, num_patches, merge_size)
    lengths = segment_lengths(grids, segment_by_frame)
    lengths += [0] * (_num_segments(grid_thw, num_patches, merge_size, segment_by_frame) - len(lengths))
    tensors = patch_tensors(grids, table_side, merge_size, "block" if block_order else "raster")
    return tuple(t.to(device) for t in (cumulative_lengths(lengths), *tensors))


def _fake(grid_thw, num_patches, table_side, merge_size, segment_by_frame, block_order, device):
    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return (
        new(_num_segments(grid_thw, num_patches, merge_size, segment_by_frame) + 1),
        new(2, num_patches),
        new(num_patches, 4),
        new(num_patches, 4, dtype=torch.float32),
        new(num_patches, dtype=torch.int64),
        new(num_patches // merge_size**2, merge_size**2),
    )


def _num_segments(grid_thw: Tensor, num_patches: int, merge_size: int, segment_by_frame: bool) -> int:
    """A size that follows from shapes alone. The number of frames does not: a frame has at least one merged patch."""
    return num_patches // merge_size**2 if segment_by_frame else grid_thw.shape[0]


define(
    "vision_geometry",
    "Tensor grid_thw, SymInt num_patches, int table_side, int merge_size, bool segment_by_frame, bool block_order, Device device",
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", _run, _fake,
)  # fmt: skip
_geometry_op = torch.ops.keye_kernels.vision_geometry.default
