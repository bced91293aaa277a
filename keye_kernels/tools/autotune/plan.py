"""How long a sweep takes: what is timed at length, and estimates that decide which shapes fit into a limit of time.

The estimates are for an H100 with 14 compiling processes. They are derived from the number of launches, not measured there.
Compiling one kernel ahead of time for sm_90 took 0.9 to 1.6 s of CPU time (Triton 3.9, a 2-core virtual machine). This makes
about 10 minutes for the workload keye-8b, or 45 s on 14 cores, while the first shapes are timed.
"""

from collections.abc import Callable
from typing import Any

import torch

from keye_kernels.triton.spec import TuningShape

# Timed at length: the fastest of the short runs, and the heuristic's config
MAX_FINALISTS = 4
SHORT_RUN_MS, MAX_SHORT_LAUNCHES = 3.0, 20
LONG_WARM_UP_MS, LONG_RUN_MS = 10, 50
L2_FLUSH_BYTES = 256 << 20
QUANTILES = [0.5, 0.2, 0.8]

SECONDS_PER_SHAPE = 0.5  # inputs, the reference, saving
SECONDS_PER_CONFIG = 0.03  # loading the compiled kernel, one launch for the check, a short run
SECONDS_PER_FINALIST = 0.1


def estimate(num_configs: int) -> float:
    """Seconds for a shape with this many configs left to time; 0 without any."""
    if not num_configs:
        return 0.0
    return SECONDS_PER_SHAPE + SECONDS_PER_CONFIG * num_configs + SECONDS_PER_FINALIST * (MAX_FINALISTS + 1)


def reserved(shape: TuningShape, shapes: list[TuningShape], num_configs: dict[TuningShape, int]) -> float:
    """Seconds for the later shapes that depend more on their config: those with more candidates, attention above all."""
    later = shapes[shapes.index(shape) + 1 :]
    return sum(estimate(num_configs[other]) for other in later if num_configs[other] > num_configs[shape])


def quick_timer(device: torch.device) -> Callable[[Callable[[], Any]], list[float]]:
    """A function that times a few launches in ms: median, 20th and 80th percentile. The L2 cache is flushed before each.

    One launch decides how many more there are, at most `SHORT_RUN_MS` of them: a slow config costs two launches.
    """
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device)

    def launches(run: Callable[[], Any], count: int) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for before, after in pairs:
            flush.zero_()
            before.record()
            run()
            after.record()
        torch.cuda.synchronize(device)
        return [before.elapsed_time(after) for before, after in pairs]

    def quick(run: Callable[[], Any]) -> list[float]:
        (first,) = launches(run, 1)
        count = min(max(1, int(SHORT_RUN_MS / max(first, 1e-3))), MAX_SHORT_LAUNCHES)
        times = torch.tensor(launches(run, count), dtype=torch.float64)
        return times.quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist()

    return quick
