"""Chooses one launch config per table key from the times of all candidates on all shapes."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from keye_kernels.triton.launch_config import BUCKETS, Config, ConfigKey
from keye_kernels.triton.registry import kernel_spec


@dataclass
class MeasuredShape:
    """The times of one shape in microseconds. Rejected configs are not among them."""

    kernel: str
    key: ConfigKey
    heuristic: Config
    times: list[tuple[Config, float]]


def choose(measured: Iterable[MeasuredShape], margin: float) -> list[tuple[MeasuredShape, Config]]:
    """The config of each key of one kernel, with one of the shapes that have the key.

    Shapes with the same key share the config with the smallest geometric mean. The heuristic's config stays unless another one is
    faster by more than `margin`. The spec's `fields_shared_by_buckets` have one value for all buckets: the heuristic's, unless
    another is faster by more than `margin` in the median bucket.
    """
    families: dict[tuple, dict[tuple, list[MeasuredShape]]] = {}
    for shape in measured:
        family = tuple(value for name, value in sorted(shape.key.items()) if name not in BUCKETS)
        families.setdefault((shape.kernel, family), {}).setdefault(_frozen(shape.key), []).append(shape)
    return [
        pair
        for (kernel, _), keys in families.items()
        for pair in _of_family(kernel_spec(kernel).fields_shared_by_buckets, keys, margin)
    ]


def _of_family(
    shared: tuple[str, ...], keys: dict[tuple, list[MeasuredShape]], margin: float
) -> list[tuple[MeasuredShape, Config]]:
    means = {key: mean for key, shapes in keys.items() if (mean := _means(shapes))}
    if not means:
        return []
    default = _values(shared, next(iter(keys.values()))[0].heuristic)
    # Values of the shared fields -> (sum of logarithms, config of each key)
    best: dict[tuple, tuple[float, dict]] = {}
    for values in dict.fromkeys(_values(shared, dict(config)) for mean in means.values() for config in mean):
        total, configs = 0.0, {}
        for key, mean in means.items():
            allowed = {config: time for config, time in mean.items() if _values(shared, dict(config)) == values}
            if not allowed:
                break
            chosen = min(allowed, key=allowed.get)
            heuristic = _frozen(keys[key][0].heuristic)
            if heuristic in allowed and allowed[chosen] >= allowed[heuristic] + math.log(1 - margin):
                chosen = heuristic
            total, configs[key] = total + allowed[chosen], chosen
        else:
            best[values] = total, configs
    if not best:  # no value works for every key: keep the heuristic
        return []
    winner = min(best, key=lambda values: best[values][0])
    if default in best:
        gains = [means[key][best[default][1][key]] - means[key][best[winner][1][key]] for key in means]
        if median(gains) <= -math.log(1 - margin):  # the mean would be decided by one shape of 16 tokens
            winner = default
    return [(keys[key][0], dict(config)) for key, config in best[winner][1].items()]


def _means(shapes: list[MeasuredShape]) -> dict[tuple, float]:
    """Mean logarithm of the times of each config that works for all shapes. The order of the candidates decides ties."""
    times = [{_frozen(config): time for config, time in shape.times} for shape in shapes]
    common = [config for config in times[0] if all(config in other for other in times[1:])]
    return {config: sum(math.log(each[config]) for each in times) / len(times) for config in common}


def _values(names: tuple[str, ...], config: Config) -> tuple:
    return tuple(config[name] for name in names)


def _frozen(fields: Config) -> tuple:
    return tuple(sorted(fields.items()))
