"""The flat tile schedule of packed segments: one entry for each query tile that has work, and none that has not.

A grid of segments x longest segment starts a program for every tile that some segment might have; with images of different
sizes more than half of those find nothing. The entries here are made on the host, from offsets that are read once.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class TileSchedule:
    """What one launch needs to know of the segments.

    `entries` is int32 [tiles, 3] on the offsets' device: a segment's first token, its length, and the tile's first query.
    Most work first, so that no long tile starts when the others are done. Work ties leave a segment's tiles together: the
    programs that run at a time read the same keys.
    """

    entries: Tensor
    longest: int  # tokens of the longest segment
    first_token: int
    end_token: int  # tokens outside [first_token, end_token) are of no segment

    def covers(self, num_tokens: int) -> bool:
        """Whether every one of the `num_tokens` tokens is of some segment."""
        return self.first_token == 0 and self.end_token == num_tokens


@dataclass
class _Segments:
    """The host's copy of one offsets tensor and the schedules made from it."""

    version: int
    offsets: Tensor  # int64 [S+1]
    schedules: dict[tuple[int, bool], TileSchedule] = field(default_factory=dict)


_known = WeakIdKeyDictionary()


def tile_schedule(cu_seqlens: Tensor, block_m: int, causal: bool) -> TileSchedule:
    """The schedule of `block_m` queries a tile.

    Args:
        cu_seqlens: [S+1] int32, any device. Its values are read at the first call with this tensor object and after
            in-place changes, so that a tower of many layers reads them once. An inference tensor has no version to tell
            a change by, and is read in every call: make offsets outside `torch.inference_mode`.
        causal: tile t sees the keys up to its own last row, instead of all of its segment.

    Raises: ValueError if the offsets are negative or decrease.
    """
    version = -1 if cu_seqlens.is_inference() else cu_seqlens._version
    segments = _known.get(cu_seqlens)
    if segments is None or segments.version != version or version < 0:
        segments = _Segments(version, _read_offsets(cu_seqlens))
        _known[cu_seqlens] = segments
    key = (block_m, causal)
    if key not in segments.schedules:
        segments.schedules[key] = _build(segments.offsets, block_m, causal, cu_seqlens.device)
    return segments.schedules[key]


def _read_offsets(cu_seqlens: Tensor) -> Tensor:
    offsets = cu_seqlens.to("cpu", torch.int64, copy=True)
    if offsets[0] < 0 or (offsets.diff() < 0).any():
        raise ValueError(f"cu_seqlens must start at 0 or later and never decrease, got {offsets.tolist()}")
    return offsets


def _build(offsets: Tensor, block_m: int, causal: bool, device: torch.device) -> TileSchedule:
    lengths = offsets.diff()
    tiles = (lengths + block_m - 1) // block_m
    segment = torch.repeat_interleave(torch.arange(len(tiles)), tiles)
    tile = torch.arange(len(segment)) - (tiles.cumsum(0) - tiles)[segment]
    work = torch.minimum(lengths[segment], (tile + 1) * block_m) if causal else lengths[segment]
    order = work.argsort(descending=True, stable=True)
    segment, tile = segment[order], tile[order]
    entries = torch.stack((offsets[segment], lengths[segment], tile * block_m), dim=1).to(torch.int32)
    longest = int(lengths.max()) if len(lengths) else 0
    return TileSchedule(entries.to(device, non_blocking=True), longest, int(offsets[0]), int(offsets[-1]))
