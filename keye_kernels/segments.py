"""Packed attention segments: token offsets, and the tile schedule of the attention kernel. Symbols: T tokens, S segments."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .host_copy import copy_to_device, overwrite


@dataclass(frozen=True, eq=False)
class Segments:
    """How the T tokens of a batch are divided into attention segments. Every token belongs to one, unless `covers_all_tokens` is
    False: then the output is 0 for the others. Else their rows are not initialized on a GPU.

    Layers share one object: its schedules are built once per batch, and no layer reads the offsets back from the device. A CUDA
    graph keeps the schedules of its capture; to replay it with other offsets, capture it with `PaddedSegments`, or with
    `Segments` without lengths.
    """

    cu_seqlens: Tensor  # [S+1] int32 offsets on the device, from 0 to T
    max_seqlen: int  # length of the longest segment, or an upper bound
    lengths: tuple[int, ...] | None = None  # on the host; None where only the device knows them
    covers_all_tokens: bool = True  # False is for segments without lengths
    _schedules: dict[tuple[int, bool], Tensor] = field(default_factory=dict, init=False, repr=False)
    prepared_calls: dict[tuple, Callable] = field(default_factory=dict, init=False, repr=False)  # see ops/prepared.py

    def __post_init__(self) -> None:
        if self.lengths is None:
            return
        if min(self.lengths, default=0) < 0 or len(self.lengths) + 1 != self.cu_seqlens.shape[0]:
            found = f"{list(self.lengths)} with {self.cu_seqlens.shape[0]} offsets"
            raise ValueError(f"lengths must be one not negative number per segment of cu_seqlens, got {found}")

    @cached_property
    def num_tokens(self) -> int | None:
        """T; None where only the device knows it."""
        return None if self.lengths is None else sum(self.lengths)

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device) -> "Segments":
        cu_seqlens = copy_to_device(cumulative_lengths(lengths), device)
        return cls(cu_seqlens, max(lengths, default=0), tuple(lengths))

    def schedule(self, block_m: int, causal: bool) -> Tensor | None:
        """`tile_schedule` of these segments on their device, cached; None where the lengths are not known on the host."""
        if self.lengths is None:
            return None
        key = (block_m, causal)
        if key not in self._schedules:
            schedule = self._host_schedule(self.lengths, block_m, causal)
            self._schedules[key] = copy_to_device(schedule, self.cu_seqlens.device)
        return self._schedules[key]

    def _host_schedule(self, lengths: Sequence[int], block_m: int, causal: bool) -> Tensor:
        return tile_schedule(cumulative_lengths(lengths), block_m, causal)


class PaddedSegments(Segments):
    """Segments in tensors of a fixed size, which `update` overwrites, so that one CUDA graph serves all of them.

    At most `num_segments` segments with at most `num_tokens` tokens, the longest of at most `max_seqlen`. No program works for
    the tokens after them, and their rows of the output are not initialized on a GPU.
    """

    capacity: int  # tokens

    def __init__(self, num_segments: int, num_tokens: int, max_seqlen: int, device: torch.device):
        lengths = (0,) * num_segments
        super().__init__(cumulative_lengths(lengths).to(device), max_seqlen, lengths)
        # The number of rows of q, not the sum of the lengths
        self.__dict__.update(capacity=num_tokens, num_tokens=num_tokens)

    def update(self, lengths: Sequence[int]) -> None:
        """Sets the segments. Raises ValueError if they do not fit."""
        num_segments = self.cu_seqlens.shape[0] - 1
        if len(lengths) > num_segments or sum(lengths) > self.capacity or max(lengths, default=0) > self.max_seqlen:
            limits = f"{num_segments} segments of up to {self.max_seqlen} tokens, {self.capacity} in all"
            raise ValueError(f"lengths must be at most {limits}, got {list(lengths)}")
        lengths = (*lengths, *[0] * (num_segments - len(lengths)))
        object.__setattr__(self, "lengths", lengths)
        overwrite(self.cu_seqlens, cumulative_lengths(lengths))
        for key, schedule in self._schedules.items():
            overwrite(schedule, self._host_schedule(lengths, *key))

    def _host_schedule(self, lengths: Sequence[int], block_m: int, causal: bool) -> Tensor:
        """Entries of no query fill the schedule up to the largest number of tiles."""
        entries = super()._host_schedule(lengths, block_m, causal)
        max_tiles = self.capacity // block_m + len(lengths)
        return F.pad(entries, (0, 0, 0, max_tiles - len(entries)))


def cumulative_lengths(lengths: Sequence[int]) -> Tensor:
    """[S+1] int32 offsets of segments of these lengths, on the CPU."""
    return torch.tensor([0, *lengths], dtype=torch.int64, device="cpu").cumsum(0).to(torch.int32)


def tile_schedule(offsets: Tensor, block_m: int, causal: bool) -> Tensor:
    """[tiles, 3] int32: first token and length of a segment, and the first query of one of its tiles of `block_m` queries.

    `offsets` are [S+1] int32 on the CPU. With `causal`, a tile attends to the keys up to its own last query instead of all keys
    of its segment. A grid of (segments, longest segment) would start programs without work wherever images differ in size; here
    every entry has work. Entries are sorted by work, most first, so that no long tile starts last. Ties keep the tiles of a
    segment together: programs that run at the same time then read the same keys.
    """
    offsets = offsets.to(torch.int64)
    lengths = offsets.diff()
    tiles = (lengths + block_m - 1) // block_m
    segment = torch.repeat_interleave(torch.arange(len(tiles), device="cpu"), tiles)
    tile = torch.arange(len(segment), device="cpu") - (tiles.cumsum(0) - tiles)[segment]
    work = torch.minimum(lengths[segment], (tile + 1) * block_m) if causal else lengths[segment]
    order = work.argsort(descending=True, stable=True)
    segment, tile = segment[order], tile[order]
    return torch.stack((offsets[segment], lengths[segment], tile * block_m), dim=1).to(torch.int32)
