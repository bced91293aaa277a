"""What a benchmark records beside its seconds: errors, memory, bytes and FLOPs, the machine and its peaks."""

import importlib.metadata
import logging
import platform
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keye_kernels.triton import tiles

# Of the reference's largest value. Half precision: eager maths rounds up to four times; float32: products of 4608 terms
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4 * 2**-10, torch.bfloat16: 4 * 2**-7}
FLUSH_BYTES = 256 << 20  # more than the L2 of any GPU
# By a part of the device's name: GB/s, and TFLOP/s without sparsity in half precision and in float32 (data sheets)
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
class Work:
    """What a call needs at least: every input read once, every output written once, no padded multiply."""

    tokens: int
    bytes: int
    flops: int = 0


def nbytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def as_tuple(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def relative_error(output: Any, expected: Any) -> float:
    """The largest deviation over the largest expected value, in the worst of several outputs; inf for shapes or NaN."""
    outputs, references = as_tuple(output), as_tuple(expected)
    if [x.shape for x in outputs] != [x.shape for x in references]:
        return float("inf")
    errors = [
        float((x.double() - y.double()).abs().amax() / y.double().abs().amax())
        for x, y in zip(outputs, references, strict=True)
    ]
    return max(error if error == error else float("inf") for error in errors)


def with_peak_memory(call: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """The call's output, and the most bytes held during it above what was held before."""
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
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return output, peak


class EventTime:
    """A moment on the GPU's own clock: the difference of two is seconds between two CUDA events."""

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, start: "EventTime") -> float:
        self.event.synchronize()
        return start.event.elapsed_time(self.event) / 1e3


def event_timer() -> EventTime:
    """A timer for pytest-benchmark. Nothing waits between its two calls, so that launches queue up behind the flush."""
    return EventTime()


def flush_l2(device: torch.device) -> Callable[[], None]:
    """A function that fills the L2 with something else, and keeps the GPU busy while the host launches what is timed."""
    buffer = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def flush() -> None:
        buffer.zero_()

    return flush


@contextmanager
def tile_sources():
    """Collects where kernels launched inside take their tiles from, by the kernel's name."""
    found: dict[str, str] = {}

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            name, separator, source = record.getMessage().partition(": tiles from ")
            if separator:
                found[name.partition(" on ")[0]] = source.partition(";")[0]

    handler, level = Keep(), tiles.logger.level
    # Look-ups are remembered, and so are the messages about them
    tiles.clear_cache()
    tiles._report.cache_clear()
    tiles.logger.addHandler(handler)
    tiles.logger.setLevel(logging.INFO)
    try:
        yield found
    finally:
        tiles.logger.removeHandler(handler)
        tiles.logger.setLevel(level)


def gpu_info() -> dict[str, Any] | None:
    """The GPU and its peaks; None on a machine without one."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    bandwidth, half, single = next((peak for name, peak in PEAKS.items() if name in properties.name), (None,) * 3)
    flops = None if half is None else {"float16": half, "bfloat16": half, "float32": single}
    return {
        "name": properties.name,
        "target": tiles.target_name(torch.device("cuda")),
        "memory_bytes": properties.total_memory,
        "processors": properties.multi_processor_count,
        "peak_gb_per_s": bandwidth,
        "peak_tflop_per_s": flops,
    }


def rates(work: Work, seconds: float | None, dtype: str, gpu: dict[str, Any] | None) -> dict[str, float | None]:
    """gb_per_s, tflop_per_s and roofline_share of a call that took `seconds` (None: not timed)."""
    if seconds is None:
        return dict.fromkeys(("gb_per_s", "tflop_per_s", "roofline_share"))
    gb, tflop, share = work.bytes / seconds / 1e9, work.flops / seconds / 1e12, None
    if gpu is not None and gpu["peak_gb_per_s"] is not None:
        share = max(gb / gpu["peak_gb_per_s"], tflop / gpu["peak_tflop_per_s"][dtype])
    return {"gb_per_s": gb, "tflop_per_s": tflop, "roofline_share": share}


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "triton", "keye_kernels"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found
