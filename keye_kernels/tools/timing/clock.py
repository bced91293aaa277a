"""How long a call takes: CUDA events on a GPU, the wall clock on a CPU. `timed_call` is the only place that decides it."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .measuring import with_peak_memory
from .profiling import GpuActivity, profiled

WARM_UP_CALLS = 2
MIN_ROUNDS, MAX_ROUNDS = 5, 30
SECONDS_PER_CALL_MEASURED = 0.6  # of all rounds together, within these bounds


def timed_call(call: Callable[[], Any], device: torch.device, repeat: int = 1) -> tuple[float, float]:
    """Seconds of one call on an idle device, and seconds of the CPU until the call returned.

    With `repeat`, the mean of that many calls in a row: the CPU may run ahead of the GPU.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeat):
            call()
        seconds = (time.perf_counter() - start) / repeat
        return seconds, seconds
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    before.record()
    for _ in range(repeat):
        call()
    after.record()
    cpu = time.perf_counter() - start
    torch.cuda.synchronize(device)
    return before.elapsed_time(after) / 1e3 / repeat, cpu / repeat


@dataclass(frozen=True)
class Measurement:
    """All rounds of one call, what the GPU did during one of them (None if unknown), and the peak of memory in bytes."""

    seconds: list[float]
    cpu_seconds: list[float]
    activity: GpuActivity | None
    peak_memory_bytes: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def measure(call: Callable[[], Any], device: torch.device, repeat: int = 1) -> Measurement:
    """Warms up, times, profiles, and measures the memory of a call."""
    for _ in range(WARM_UP_CALLS):
        once, _ = timed_call(call, device, repeat)
    rounds = int(SECONDS_PER_CALL_MEASURED / max(once * repeat, 1e-9))
    times = [timed_call(call, device, repeat) for _ in range(min(max(rounds, MIN_ROUNDS), MAX_ROUNDS))]
    activity = profiled(call, device)
    _, peak = with_peak_memory(call, device)
    return Measurement([wall for wall, _ in times], [cpu for _, cpu in times], activity, peak)


def recorded(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The call as one CUDA graph: its launches take no time on the CPU."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return replay
