"""Where every patch of a packed vision batch stands, computed once on the host from `grid_thw`.

Symbols: n grids (one an image or a run of frames), T patches, S attention segments, m merge size.
Raster order: frame by frame, row by row. Block order: within a frame, the m x m patches that the projector will merge stand
side by side, blocks row by row; attention does not care, and the merge becomes a view.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

Grid = tuple[int, int, int]
Order = Literal["block", "raster"]


@dataclass(frozen=True)
class VisionBatch:
    """The geometry of one packed batch of pictures; layers receive it and read no tensor's values.

    cu_seqlens [S+1] int32 and max_seqlen: the attention segments. position_ids [2, T] int32: row and column of each patch.
    corner_index [T, 4] int32 and corner_weight [T, 4] float32: the learned positions around each patch and their weights.
    raster_index [T] int64: the raster index of each patch, in the order of this batch. merge_index [T/m², m²] int32: the
    rows that the projector joins, None in block order, where they lie side by side.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    position_ids: Tensor
    corner_index: Tensor
    corner_weight: Tensor
    raster_index: Tensor
    merge_index: Tensor | None

    @classmethod
    def build(
        cls,
        grid_thw: Tensor,
        num_patches: int,
        *,
        table_side: int,
        merge_size: int = 2,
        segment_by_frame: bool = False,
        order: Order = "block",
        device: torch.device | None = None,
    ) -> "VisionBatch":
        """Builds the geometry of `grid_thw` [n, 3] (frames, patch rows, patch columns) for tensors on `device`.

        Attention segments are whole grids (Preview) or single frames (1.5, `segment_by_frame`). `table_side` is the side of
        the learned square grid of positions. Raises ValueError for an odd or empty grid, or where `num_patches` disagrees.
        """
        device = grid_thw.device if device is None else device
        if torch.compiler.is_compiling():
            # Inside a compiled graph sizes must follow from T alone: the list of segments is padded with empty ones
            tensors = torch.ops.keye_kernels.vision_geometry(
                grid_thw, num_patches, table_side, merge_size, segment_by_frame, order == "block", device
            )
            cu_seqlens, position_ids, corner_index, corner_weight, raster_index, merge_index = tensors
            max_seqlen = num_patches
        else:
            grids = check_grid_thw(grid_thw, num_patches, merge_size)
            lengths = segment_lengths(grids, segment_by_frame)
            max_seqlen = max(lengths, default=0)
            tensors = patch_tensors(grids, table_side, merge_size, order)
            # Tensors made in inference mode count no versions, and what follows from the offsets could not be remembered
            with torch.inference_mode(False):
                cu_seqlens = cumulative(lengths).to(device, non_blocking=True)
            moved = (t.to(device, non_blocking=True) for t in tensors)
            position_ids, corner_index, corner_weight, raster_index, merge_index = moved
        merge_index = None if order == "block" else merge_index
        return cls(cu_seqlens, max_seqlen, position_ids, corner_index, corner_weight, raster_index, merge_index)


def check_grid_thw(grid_thw: Tensor, num_patches: int | None, merge_size: int) -> list[Grid]:
    """The grids as Python numbers; ValueError or TypeError where they cannot be those of `num_patches` patches."""
    if not isinstance(grid_thw, Tensor):
        raise TypeError(f"grid_thw must be an integer tensor of shape [n, 3], got {type(grid_thw).__name__}")
    if grid_thw.is_floating_point() or grid_thw.ndim != 2 or grid_thw.shape[1] != 3:
        raise ValueError(f"grid_thw must be integer [n, 3], got {grid_thw.dtype} {list(grid_thw.shape)}")
    grids = [tuple(row) for row in grid_thw.tolist()]
    for t, h, w in grids:
        if min(t, h, w) < 1 or h % merge_size or w % merge_size:
            raise ValueError(
                f"grid_thw must hold positive sizes with rows and columns divisible by {merge_size}, got {(t, h, w)}; "
                "resize pictures to multiples of 28 pixels"
            )
    total = sum(t * h * w for t, h, w in grids)
    if num_patches is not None and total != num_patches:
        raise ValueError(f"grid_thw describes {total} patches, but {num_patches} patches were given")
    return grids


def segment_lengths(grids: list[Grid], by_frame: bool) -> list[int]:
    """Patches of each attention segment: a whole grid, or one of its frames."""
    return [length for t, h, w in grids for length in ([h * w] * t if by_frame else [t * h * w])]


def cumulative(lengths: list[int]) -> Tensor:
    """[S+1] int32 offsets of segments of these lengths, on the CPU."""
    return torch.tensor([0, *lengths], dtype=torch.int64, device="cpu").cumsum(0).to(torch.int32)


def patch_tensors(grids: list[Grid], table_side: int, merge_size: int, order: Order) -> tuple[Tensor, ...]:
    """position_ids, corner_index, corner_weight, raster_index and merge_index (see `VisionBatch`), on the CPU."""
    positions, corners, weights, raster, merged = [], [], [], [], []
    first = 0
    for t, h, w in grids:
        position, index, weight, frame, by_block = _frame_tensors(h, w, table_side, merge_size, order)
        positions.append(position.repeat(1, t))
        corners.append(index.repeat(t, 1))
        weights.append(weight.repeat(t, 1))
        starts = first + h * w * torch.arange(t, device="cpu")[:, None]
        raster.append((starts + frame).flatten())
        merged.append((starts + by_block).view(-1, merge_size**2))
        first += t * h * w
    if not grids:
        with torch.device("cpu"):
            positions, raster = [torch.zeros(2, 0, dtype=torch.int32)], [torch.zeros(0, dtype=torch.int64)]
            corners, weights = [torch.zeros(0, 4, dtype=torch.int32)], [torch.zeros(0, 4)]
            merged = [torch.zeros(0, merge_size**2, dtype=torch.int64)]
    return (
        torch.cat(positions, dim=1),
        torch.cat(corners),
        torch.cat(weights),
        torch.cat(raster),
        torch.cat(merged).int(),
    )


def _frame_tensors(h: int, w: int, table_side: int, merge_size: int, order: Order) -> tuple[Tensor, ...]:
    """Of one frame: positions, corners and their weights, and in raster indices the order of its patches and block order."""
    # What a mode makes of these tensors (fake ones, say) is the mode's own
    make = _make_frame if _get_current_dispatch_mode() is None else _make_frame.__wrapped__
    return make(h, w, table_side, merge_size, order)


@lru_cache(maxsize=64)  # a batch has frames of one size, and a service a few sizes
def _make_frame(h: int, w: int, table_side: int, merge_size: int, order: Order) -> tuple[Tensor, ...]:
    # On the CPU whatever the default device is at the first call
    rows, columns = (torch.arange(size, device="cpu") for size in (h, w))
    at = torch.arange(h * w, device="cpu").view(h, w)
    by_block = _block_order(at, merge_size)
    frame = by_block if order == "block" else at.flatten()
    position = torch.stack((rows[:, None].expand(h, w), columns.expand(h, w))).reshape(2, -1)[:, frame].int()
    index, weight = _bilinear_corners(h, w, table_side)
    return position, index[frame].int(), weight[frame], frame, by_block


def _block_order(at: Tensor, merge_size: int) -> Tensor:
    """[h*w] entries of an [h, w] frame, blocks of merge_size x merge_size side by side."""
    h, w = at.shape
    blocks = at.view(h // merge_size, merge_size, w // merge_size, merge_size)
    return blocks.transpose(1, 2).reshape(-1)


def _bilinear_corners(h: int, w: int, side: int) -> tuple[Tensor, Tensor]:
    """[h*w, 4] entries of a side x side table and their float32 weights: bilinear, align_corners=False, no antialias."""
    (top, bottom, down), (left, right, across) = _axis(h, side), _axis(w, side)
    rows = torch.stack((top, top, bottom, bottom), dim=-1)[:, None]  # [h, 1, 4]
    columns = torch.stack((left, right, left, right), dim=-1)  # [w, 4]
    row_weight = torch.stack((1 - down, 1 - down, down, down), dim=-1)[:, None]
    column_weight = torch.stack((1 - across, across, 1 - across, across), dim=-1)
    return (rows * side + columns).view(-1, 4), (row_weight * column_weight).view(-1, 4)


def _axis(size: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `size` cells the two nearest of `side` entries and the weight of the second."""
    centre = ((torch.arange(size, dtype=torch.float32, device="cpu") + 0.5) * (side / size) - 0.5).clamp(min=0)
    low = centre.long().clamp(max=side - 1)
    return low, (low + 1).clamp(max=side - 1), centre - low
