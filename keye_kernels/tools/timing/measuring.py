"""What a benchmark records in addition to the time: error, peak memory, bytes, FLOPs, the GPU and its peak rates."""

import importlib.metadata
import logging
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keye_kernels.triton import launch_config
from keye_kernels.triton.device import device_arch

# Relative to the largest value of the reference. Half precision: eager code rounds up to four times. float32: sums of 4608 terms.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4 * 2**-10, torch.bfloat16: 4 * 2**-7}
L2_FLUSH_BYTES = 256 << 20  # larger than the L2 cache of any GPU
# Data sheet values by a part of the device name: GB/s, dense TFLOP/s in half precision, TFLOP/s in float32
PEAKS = {
    "H200": (4800, 989, 67),
    "H100 PCIe": (2000, 756, 51),
    "H100": (3350, 989, 67),
    "A100-SXM4-80GB": (2039, 312, 19.5),
    "A100": (1555, 312, 19.5),
    "B200": (8000, 2250, 75),
    "L40S": (864, 362, 91.6),
    "L4": (300, 121, 30.3),
    "RTX 4090": (1008, 165, 82.6),
    "MI300X": (5300, 1307, 163),
}


@dataclass(frozen=True)
class RequiredWork:
    """The minimum of a call: every input is read once, every output is written once, and no FLOPs are spent on padding."""

    tokens: int
    bytes: int
    flops: int = 0


def nbytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def as_tuple(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def relative_error(output: Any, expected: Any) -> float:
    """Largest absolute error divided by the largest expected value, over all outputs. inf for a wrong shape or NaN."""
    outputs, references = as_tuple(output), as_tuple(expected)
    if [x.shape for x in outputs] != [x.shape for x in references]:
        return float("inf")
    errors = [
        float((x.double() - y.double()).abs().amax() / y.double().abs().amax()) for x, y in zip(outputs, references, strict=True)
    ]
    return max(error if error == error else float("inf") for error in errors)


def with_peak_memory(call: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """The output of the call, and the peak of allocated bytes during it, minus what was allocated before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        output = call()
        torch.cuda.synchronize(device)
        return output, torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        output = call()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return output, peak


class EventTime:
    """A recorded CUDA event. The difference of two is the time between them in seconds."""

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, start: "EventTime") -> float:
        self.event.synchronize()
        return start.event.elapsed_time(self.event) / 1e3


def event_timer() -> EventTime:
    """A timer for pytest-benchmark. It does not synchronize, so launches are queued while the L2 flush still runs."""
    return EventTime()


def flush_l2(device: torch.device) -> Callable[[], None]:
    """A function that overwrites the L2 cache. It also keeps the GPU busy, which hides the launch overhead of the timed call."""
    buffer = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device)

    def flush() -> None:
        buffer.zero_()

    return flush


@contextmanager
def config_sources() -> Iterator[dict[str, str]]:
    """Collects, by kernel name, the source of the launch config of each kernel launched inside the block."""
    found: dict[str, str] = {}

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            name, separator, source = record.getMessage().partition(": launch configs from ")
            if separator:
                found[name.partition(" on ")[0]] = source.partition(";")[0]

    handler, level = Collector(), launch_config.logger.level
    # Lookups and their log messages are cached
    launch_config.clear_cache()
    launch_config.log_once.cache_clear()
    launch_config.logger.addHandler(handler)
    launch_config.logger.setLevel(logging.INFO)
    try:
        yield found
    finally:
        launch_config.logger.removeHandler(handler)
        launch_config.logger.setLevel(level)


def gpu_info() -> dict[str, Any] | None:
    """Name, size and peak rates of the GPU. None without a GPU."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    gb_per_s, half, single = next((peak for name, peak in PEAKS.items() if name in properties.name), (None,) * 3)
    tflop_per_s = None if half is None else {"float16": half, "bfloat16": half, "float32": single}
    return {
        "name": properties.name,
        "target": device_arch(torch.device("cuda")).name,
        "memory_bytes": properties.total_memory,
        "multi_processor_count": properties.multi_processor_count,
        "peak_gb_per_s": gb_per_s,
        "peak_tflop_per_s": tflop_per_s,
    }


def machine_info() -> dict[str, Any]:
    """System, CPU and GPU, under the names that pytest-benchmark uses."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = {"brand_raw": names[0] if names else platform.processor() or "unknown", "count": os.cpu_count()}
    return {"system": platform.system(), "release": platform.release(), "cpu": cpu, "gpu": gpu_info()}


def rates(work: RequiredWork, seconds: float, dtype: str, gpu: dict[str, Any] | None) -> dict[str, float | None]:
    """gb_per_s, tflop_per_s and roofline_share (None if the peak rates are unknown) of a call."""
    gb, tflop, share = work.bytes / seconds / 1e9, work.flops / seconds / 1e12, None
    if gpu is not None and gpu["peak_gb_per_s"] is not None:
        share = max(gb / gpu["peak_gb_per_s"], tflop / gpu["peak_tflop_per_s"][dtype])
    return {"gb_per_s": gb, "tflop_per_s": tflop, "roofline_share": share}


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that a result depends on. None for a package that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "triton", "keye_kernels"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found
