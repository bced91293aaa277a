"""What the GPU does during a call, from torch's profiler: how long it is busy, its kernels, and the launches of the CPU."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity

logger = logging.getLogger(__name__)

# cudaLaunchKernel, cudaLaunchKernelExC, cuLaunchKernelEx, cudaLaunchCooperativeKernel, cudaGraphLaunch, hipModuleLaunchKernel
LAUNCH = re.compile(r"(cu|cuda|hip)(Ext)?(Module)?(Launch\w*Kernel\w*|GraphLaunch\w*)$")
NUM_SLOWEST = 10


class ProfilerEvent(NamedTuple):
    """One event. `gpu` is the index of the GPU on which it ran, None for an event of the CPU."""

    name: str
    start_ns: int
    duration_ns: int
    gpu: int | None


@dataclass(frozen=True)
class GpuActivity:
    """Work of the GPU, and of the CPU to launch it.

    Attributes:
        busy_seconds: time in which at least one kernel, copy or memset ran; with several GPUs, of the busiest.
        kernels: kernels that ran, including those of replayed CUDA graphs.
        launches: calls of the driver by the CPU that launch a kernel or a CUDA graph.
        slowest: (name, seconds, count) of the kernels and copies with the largest sums.
    """

    busy_seconds: float
    kernels: int
    launches: int
    slowest: list[tuple[str, float, int]]


def gpu_activity(events: Iterable[ProfilerEvent]) -> GpuActivity:
    """Sums up the events of one profile. Without an event of a GPU, everything on the GPU is 0."""
    intervals: dict[int, list[tuple[int, int]]] = {}
    seconds: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    launches = 0
    for event in events:
        if event.gpu is None:
            launches += LAUNCH.match(event.name) is not None
            continue
        intervals.setdefault(event.gpu, []).append((event.start_ns, event.start_ns + event.duration_ns))
        seconds[event.name] += event.duration_ns
        counts[event.name] += 1
    kernels = sum(count for name, count in counts.items() if not is_copy(name))
    slowest = [(name, duration / 1e9, counts[name]) for name, duration in seconds.most_common(NUM_SLOWEST)]
    return GpuActivity(max(map(covered, intervals.values()), default=0) / 1e9, kernels, launches, slowest)


def is_copy(name: str) -> bool:
    """Whether a GPU event is a copy or a memset by the driver: "Memcpy DtoD (Device -> Device)", "Memset (Device)"."""
    return name.startswith(("Memcpy", "Memset"))


def covered(intervals: Iterable[tuple[int, int]]) -> int:
    """The length of the union of intervals (start, end)."""
    total, reached = 0, None
    for start, end in sorted(intervals):
        if reached is None or start > reached:
            reached = start
        total += max(0, end - reached)
        reached = max(reached, end)
    return total


def profiled(call: Callable[[], Any], device: torch.device) -> GpuActivity | None:
    """Runs a call under the profiler, up to the end of its work on the GPU.

    None, with a warning, if the profiler sees no work of a GPU: the driver may not permit it. None on a CPU.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    try:
        with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize(device)
        found = gpu_activity(profiler_events(profile))
    except RuntimeError as error:
        logger.warning("the profiler cannot be used: %s", error)
        return None
    if not found.busy_seconds:
        logger.warning("the profiler sees no work of the GPU")
        return None
    return found


def profiler_events(profile: torch.profiler.profile) -> list[ProfilerEvent]:
    """The events of a profile, without ranges of `record_function`, which appear on the GPU too. Not `profile.events()`: slow."""
    found = []
    for event in profile.profiler.kineto_results.events():
        on_gpu = event.device_type() == torch.autograd.DeviceType.CUDA
        if on_gpu and is_annotation(event):
            continue
        found.append(ProfilerEvent(event.name(), event.start_ns(), event.duration_ns(), event.device_index() if on_gpu else None))
    return found


def is_annotation(event: Any) -> bool:
    return bool(getattr(event, "is_user_annotation", bool)())
