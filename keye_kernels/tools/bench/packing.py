"""Sharing requests among batches or devices, so that none waits long for another."""

import heapq
from collections.abc import Sequence
from itertools import pairwise

Bins = list[list[int]]  # of each bin the places of its requests in the queue


def pack_longest_first(costs: Sequence[float], bins: int) -> Bins:
    """Longest processing time first (Graham, 1969): each request, the dearest first, goes to the bin that holds least so far.

    No bin takes more than 4/3 of the best possible. Places within a bin are in the order of the queue; equal costs keep theirs.
    Raises ValueError for less than one bin, or a cost below zero.
    """
    _check(costs, bins)
    loads = [(0.0, place) for place in range(bins)]
    packed: Bins = [[] for _ in range(bins)]
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        load, place = heapq.heappop(loads)
        packed[place].append(index)
        heapq.heappush(loads, (load + costs[index], place))
    return [sorted(places) for places in packed]


def pack_first_come(costs: Sequence[float], bins: int) -> Bins:
    """Equal numbers of requests in the order of the queue, whatever they cost; ValueErrors as for the other packer."""
    _check(costs, bins)
    ends = [round(len(costs) * place / bins) for place in range(bins + 1)]
    return [list(range(start, end)) for start, end in pairwise(ends)]


def imbalance(loads: Sequence[float]) -> float:
    """How much longer the fullest bin takes than equal ones would: largest over mean, less one."""
    return max(loads) * len(loads) / sum(loads) - 1 if sum(loads) else 0.0


def _check(costs: Sequence[float], bins: int) -> None:
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    if any(cost < 0 for cost in costs):
        raise ValueError(f"costs must not be negative, got {min(costs)}")
