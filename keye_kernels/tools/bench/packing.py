"""Distributes requests over batches or devices, with equal cost for each."""

import heapq
from collections.abc import Sequence
from itertools import pairwise

Bins = list[list[int]]  # per bin, the indices of its requests in the queue


def pack_longest_first(costs: Sequence[float], bins: int) -> Bins:
    """Longest processing time first (Graham, 1969): in the order of decreasing cost, each request goes to the least loaded bin.

    The largest load is at most 4/3 of the best possible one. Raises ValueError if `bins` is less than 1 or a cost is negative.
    """
    _check(costs, bins)
    loads = [(0.0, number) for number in range(bins)]
    packed: Bins = [[] for _ in range(bins)]
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        load, number = heapq.heappop(loads)
        packed[number].append(index)
        heapq.heappush(loads, (load + costs[index], number))
    return [sorted(indices) for indices in packed]


def pack_in_arrival_order(costs: Sequence[float], bins: int) -> Bins:
    """Splits the queue into runs of equal length. The costs are ignored. Arguments and errors as in `pack_longest_first`."""
    _check(costs, bins)
    ends = [round(len(costs) * number / bins) for number in range(bins + 1)]
    return [list(range(start, end)) for start, end in pairwise(ends)]


def imbalance(loads: Sequence[float]) -> float:
    """Largest load divided by the mean load, minus 1."""
    return max(loads) * len(loads) / sum(loads) - 1 if sum(loads) else 0.0


def _check(costs: Sequence[float], bins: int) -> None:
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    if any(cost < 0 for cost in costs):
        raise ValueError(f"costs must not be negative, got {min(costs)}")
