"""From what each candidate costs on each shape to one tile a case."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from keye_kernels.triton.tiles import BUCKETS, Case, Config

from .kernels import SAME


@dataclass
class Measured:
    """One shape's costs: microseconds, or clocks of the ranking. What was rejected is not among them."""

    kernel: str
    key: Case
    default: Config  # the heuristic's tile
    costs: list[tuple[Config, float]]


def choose(measured: Iterable[Measured], margin: float) -> list[tuple[Measured, Config]]:
    """The tile of each case of one kernel that has any, with a shape of that case.

    Shapes of one case share a tile: the one with the smallest geometric mean. The heuristic's tile stays unless another is
    cheaper by more than `margin`. Fields in SAME have one value in all buckets: the heuristic's, unless another is cheaper by
    more than `margin` in the median bucket.
    """
    families: dict[tuple, dict[tuple, list[Measured]]] = {}
    for shape in measured:
        family = tuple(value for name, value in sorted(shape.key.items()) if name not in BUCKETS)
        families.setdefault((shape.kernel, family), {}).setdefault(_frozen(shape.key), []).append(shape)
    return [pair for (kernel, _), cases in families.items() for pair in _of_family(SAME.get(kernel, ()), cases, margin)]


def _of_family(
    same: tuple[str, ...], cases: dict[tuple, list[Measured]], margin: float
) -> list[tuple[Measured, Config]]:
    means = {key: mean for key, shapes in cases.items() if (mean := _means(shapes))}
    if not means:
        return []
    default = _shared(same, next(iter(cases.values()))[0].default)
    best: dict[tuple, tuple[float, dict]] = {}  # values of the shared fields -> (sum of logarithms, tile of each case)
    for values in dict.fromkeys(_shared(same, dict(config)) for mean in means.values() for config in mean):
        total, tiles = 0.0, {}
        for key, mean in means.items():
            allowed = {config: cost for config, cost in mean.items() if _shared(same, dict(config)) == values}
            if not allowed:
                break
            tile = min(allowed, key=allowed.get)
            usual = _frozen(cases[key][0].default)
            if usual in allowed and allowed[tile] >= allowed[usual] + math.log(1 - margin):
                tile = usual
            total, tiles[key] = total + allowed[tile], tile
        else:
            best[values] = total, tiles
    if not best:  # no value serves every case: the heuristic does
        return []
    winner = min(best, key=lambda values: best[values][0])
    if default in best:
        gains = [means[key][best[default][1][key]] - means[key][best[winner][1][key]] for key in means]
        if median(gains) <= -math.log(1 - margin):  # the mean would go by one case of 16 tokens
            winner = default
    return [(cases[key][0], dict(config)) for key, config in best[winner][1].items()]


def _means(shapes: list[Measured]) -> dict[tuple, float]:
    """Mean logarithm of each candidate that serves all of the shapes, in the candidates' order: of equals the first is taken."""
    costs = [{_frozen(config): cost for config, cost in shape.costs} for shape in shapes]
    shared = [config for config in costs[0] if all(config in cost for cost in costs[1:])]
    return {config: sum(math.log(cost[config]) for cost in costs) / len(costs) for config in shared}


def _shared(same: tuple[str, ...], config: Config) -> tuple:
    return tuple(config[name] for name in same)


def _frozen(fields: Config) -> tuple:
    return tuple(sorted(fields.items()))
