"""The geometry of a packed vision batch, computed once on the host from `grid_thw`.

Symbols: n grids (one per image or video), T patches, S attention segments, m merge size.
Raster order: frame by frame, row by row. Block order: within a frame, the m x m patches that the projector merges are adjacent,
blocks row by row. Attention does not depend on the order, and the merge becomes a view.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .host_copy import copy_all_to_device
from .segments import Segments, cumulative_lengths

Grid = tuple[int, int, int]
Order = Literal["block", "raster"]


@dataclass(frozen=True)
class VisionBatch:
    """The geometry of one packed batch. Layers receive it, so that none of them reads the values of a tensor."""

    segments: Segments
    position_ids: Tensor  # [2, T] int32, row and column of each patch
    corner_index: Tensor  # [T, 4] int32, the four learned positions around each patch
    corner_weight: Tensor  # [T, 4] float32, their weights
    raster_index: Tensor  # [T] int64, the raster index of each patch, in the order of this batch
    merge_index: Tensor | None  # [T/m², m²] int32, the patches of each merged row; None in block order: they are adjacent
    table_side: int  # side of the learned square grid of positions
    merge_size: int

    @classmethod
    def build(
        cls, grid_thw: Tensor, num_patches: int, *, table_side: int, merge_size: int = 2, segment_by_frame: bool = False,
        order: Order = "block", device: torch.device | None = None,
    ) -> "VisionBatch":  # fmt: skip
        """Builds the geometry from grid_thw [n, 3]. Inside `torch.compile`, use `keye_kernels.ops.build_vision_batch`.

        `table_side` is the side of the learned square grid of positions. With `segment_by_frame` the attention segments are
        single frames (1.5) instead of whole grids (Preview). `device` defaults to that of `grid_thw`. Raises ValueError if a grid
        is empty or not divisible by m, or if the grids do not have `num_patches` patches.
        """
        device = grid_thw.device if device is None else device
        grids = check_grid_thw(grid_thw, num_patches, merge_size)
        lengths = segment_lengths(grids, segment_by_frame)
        tensors = (cumulative_lengths(lengths), *patch_tensors(grids, table_side, merge_size, order))
        cu_seqlens, position_ids, corner_index, corner_weight, raster_index, merge_index = copy_all_to_device(tensors, device)
        segments = Segments(cu_seqlens, max(lengths, default=0), tuple(lengths))
        return cls(
            segments, position_ids, corner_index, corner_weight, raster_index, None if order == "block" else merge_index,
            table_side, merge_size,
        )  # fmt: skip


def check_grid_thw(grid_thw: Tensor, num_patches: int | None, merge_size: int) -> list[Grid]:
    """The grids as Python integers. ValueError or TypeError unless they are valid and have `num_patches` patches (None: any)."""
    if not isinstance(grid_thw, Tensor):
        raise TypeError(f"grid_thw must be an integer tensor of shape [n, 3], got {type(grid_thw).__name__}")
    if grid_thw.is_meta or grid_thw.layout is not torch.strided:
        raise TypeError(f"grid_thw must be a dense tensor with values, got layout {grid_thw.layout} on {grid_thw.device}")
    is_integer = not (grid_thw.is_floating_point() or grid_thw.is_complex() or grid_thw.dtype == torch.bool)
    if not is_integer or grid_thw.ndim != 2 or grid_thw.shape[1] != 3:
        raise ValueError(f"grid_thw must be integer [n, 3], got {grid_thw.dtype} {list(grid_thw.shape)}")
    grids = [tuple(row) for row in grid_thw.tolist()]
    for t, h, w in grids:
        if min(t, h, w) < 1 or h % merge_size or w % merge_size:
            raise ValueError(
                f"grid_thw must hold positive sizes with rows and columns divisible by {merge_size}, got {(t, h, w)}; "
                "resize images to multiples of 28 pixels"
            )
    total = sum(t * h * w for t, h, w in grids)
    if num_patches is not None and total != num_patches:
        raise ValueError(f"grid_thw describes {total} patches, but {num_patches} patches were given")
    return grids


def segment_lengths(grids: list[Grid], by_frame: bool) -> list[int]:
    """Number of patches of each attention segment: a whole grid, or one of its frames."""
    return [length for t, h, w in grids for length in ([h * w] * t if by_frame else [t * h * w])]


def patch_tensors(grids: list[Grid], table_side: int, merge_size: int, order: Order) -> tuple[Tensor, ...]:
    """position_ids, corner_index, corner_weight, raster_index and merge_index (see `VisionBatch`), on the CPU."""
    positions, corners, weights, raster, merged = [], [], [], [], []
    first = 0
    # Without grids: zero frames of one block, for the shapes of the empty tensors
    for t, h, w in grids or [(0, merge_size, merge_size)]:
        position, index, weight, frame, by_block = _frame_tensors(h, w, table_side, merge_size, order)
        positions.append(position.repeat(1, t))
        corners.append(index.repeat(t, 1))
        weights.append(weight.repeat(t, 1))
        starts = first + h * w * torch.arange(t, device="cpu")[:, None]
        raster.append((starts + frame).flatten())
        merged.append((starts + by_block).view(-1, merge_size**2))
        first += t * h * w
    return torch.cat(positions, dim=1), torch.cat(corners), torch.cat(weights), torch.cat(raster), torch.cat(merged).int()


def _frame_tensors(h: int, w: int, table_side: int, merge_size: int, order: Order) -> tuple[Tensor, ...]:
    """Of one frame: positions, corners, corner weights, and the raster indices of its patches in `order` and in block order."""
    # Tensors made under a dispatch mode (fake tensors, for instance) must not enter the cache
    make = _make_frame if _get_current_dispatch_mode() is None else _make_frame.__wrapped__
    return make(h, w, table_side, merge_size, order)


@lru_cache(maxsize=64)
def _make_frame(h: int, w: int, table_side: int, merge_size: int, order: Order) -> tuple[Tensor, ...]:
    # device="cpu": the default device may differ between the calls that share the cache
    rows, columns = (torch.arange(size, device="cpu") for size in (h, w))
    at = torch.arange(h * w, device="cpu").view(h, w)
    by_block = at.view(h // merge_size, merge_size, w // merge_size, merge_size).transpose(1, 2).reshape(-1)
    frame = by_block if order == "block" else at.flatten()
    position = torch.stack((rows[:, None].expand(h, w), columns.expand(h, w))).reshape(2, -1)[:, frame].int()
    index, weight = _bilinear_corners(h, w, table_side)
    return position, index[frame].int(), weight[frame], frame, by_block


def _bilinear_corners(h: int, w: int, side: int) -> tuple[Tensor, Tensor]:
    """[h*w, 4] indices into a side x side table and their float32 weights: bilinear, align_corners=False, no antialias."""
    (top, bottom, down), (left, right, across) = _axis(h, side), _axis(w, side)
    rows = torch.stack((top, top, bottom, bottom), dim=-1)[:, None]  # [h, 1, 4]
    columns = torch.stack((left, right, left, right), dim=-1)  # [w, 4]
    row_weight = torch.stack((1 - down, 1 - down, down, down), dim=-1)[:, None]
    column_weight = torch.stack((1 - across, across, 1 - across, across), dim=-1)
    return (rows * side + columns).view(-1, 4), (row_weight * column_weight).view(-1, 4)


def _axis(size: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `size` cells: the two nearest of `side` entries, and the weight of the second."""
    centre = ((torch.arange(size, dtype=torch.float32, device="cpu") + 0.5) * (side / size) - 0.5).clamp(min=0)
    low = centre.long().clamp(max=side - 1)
    return low, (low + 1).clamp(max=side - 1), centre - low
