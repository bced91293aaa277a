"""The geometry of a vision batch as an operator, so that a compiled graph can build it; see `keye_kernels.geometry`."""

import torch
from torch import Tensor

from keye_kernels.geometry import check_grid_thw, cumulative, patch_tensors, segment_lengths

from .registry import define


def _run(grid_thw, num_patches, table_side, merge_size, segment_by_frame, block_order, device):
    grids = check_grid_thw(grid_thw, num_patches, merge_size)
    lengths = segment_lengths(grids, segment_by_frame)
    lengths += [0] * (_most_segments(num_patches, merge_size) - len(lengths))
    tensors = cumulative(lengths), *patch_tensors(grids, table_side, merge_size, "block" if block_order else "raster")
    return tuple(t.to(device) for t in tensors)


def _fake(grid_thw, num_patches, table_side, merge_size, segment_by_frame, block_order, device):
    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return (
        new(_most_segments(num_patches, merge_size) + 1),
        new(2, num_patches),
        new(num_patches, 4),
        new(num_patches, 4, dtype=torch.float32),
        new(num_patches, dtype=torch.int64),
        new(num_patches // merge_size**2, merge_size**2),
    )


def _most_segments(num_patches: int, merge_size: int) -> int:
    """No segment is smaller than one merged block."""
    return num_patches // merge_size**2


define(
    "vision_geometry",
    "Tensor grid_thw, SymInt num_patches, int table_side, int merge_size, bool segment_by_frame, bool block_order, Device device",
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
