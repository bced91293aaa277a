"""`keye-kernels bench --gpu`: times the rows within a limit of time, and saves the result file after each implementation.

The file has the form of `pytest benchmarks/ --benchmark-json`, with more fields: docs/benchmarks.md describes them.
"""

import gc
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keye_kernels.tools.running import summary
from keye_kernels.tools.time_box import TimeBox
from keye_kernels.triton.launch_config import dtype_name, write_atomically

from .clock import Measurement, measure
from .measuring import RequiredWork, machine_info, rates, relative_error, versions
from .peers import Unavailable, is_interpreting
from .rows import Row
from .stages import TOLERANCES, BenchmarkCase

FLOOR = "floor"


@dataclass
class GpuResult:
    """What the result file holds.

    Attributes:
        benchmarks: one element per measured implementation.
        failed, unavailable: the reasons by "row, implementation"; unavailable are those that this machine does not have.
        left_out: rows that did not fit into the limit of time.
        seconds: duration of the command.
    """

    benchmarks: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self, machine: dict[str, Any]) -> str:
        return json.dumps({"machine_info": machine, **vars(self)}, indent=1) + "\n"


def run_rows(
    rows: Sequence[Row],
    box: TimeBox,
    path: Path,
    dtype: torch.dtype,
    device: torch.device,
    measure: Callable[[Callable[[], Any], torch.device, int], Measurement] = measure,
) -> GpuResult:
    """Times all rows that fit, in order, and prints a line per implementation.

    A failing implementation is recorded, and the others continue. Raises RuntimeError where the device stopped responding.
    """
    result, machine = GpuResult(), machine_info()
    floors: dict[str, float] = {}

    def save() -> None:
        result.seconds = round(box.elapsed, 1)
        write_atomically(path, result.to_json(machine))

    def add(row: Row, impl: str, work: RequiredWork, found: Measurement, error: float | None) -> None:
        entry = to_entry(row, impl, work, found, error, dtype, machine["gpu"], floors.get(row.name))
        result.benchmarks.append(entry)
        print(to_line(entry), flush=True)
        save()

    def skip(row: Row, impl: str, reason: str, reasons: dict[str, str]) -> None:
        reasons[f"{row.name}, {impl}"] = reason
        print(f"  {impl}: {reason}", flush=True)
        save()

    save()  # a folder that cannot be written is found out before the measurements
    for row in rows:
        if not box.fits(row.seconds):
            result.left_out.append(f"{row.name}: {', '.join(row.only)}" if row.only else row.name)
            save()
            continue
        started = box.elapsed
        print(f"[{started:5.0f} s] {row.name}", flush=True)
        case: BenchmarkCase | None = None
        try:
            with torch.inference_mode():
                case = row.case()
                expected = expected_output(case)
                if case.floor is not None and row.name not in floors:
                    floor = measure(case.floor(), device, 1)
                    add(row, FLOOR, case.work, floor, None)
                    floors[row.name] = floor.median
        except Exception as error:  # of any library; the other rows can still run
            _check_device(device, row.name)
            skip(row, "all", summary(error), result.failed)
            case = None
        for impl, make in case.make.items() if case else ():
            if row.only and impl not in row.only:
                continue
            try:
                with torch.inference_mode():
                    call = make()
                    error = relative_error(call(), expected)
                    if not math.isfinite(error):
                        raise ValueError("the output has another shape than that of the others, or is not finite")
                    add(row, impl, case.work, measure(call, device, row.repeat), error)
            except Unavailable as reason:
                skip(row, impl, str(reason).removeprefix(f"{impl}: "), result.unavailable)
            except Exception as error:
                _check_device(device, f"{row.name}, {impl}")
                skip(row, impl, summary(error), result.failed)
            call = None
        case = expected = None
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        box.record(row.seconds, box.elapsed - started)
    save()
    return result


def expected_output(case: BenchmarkCase) -> Tensor:
    """The right result: that of the case, else of its first implementation that can run."""
    reasons = []
    for make in [*([lambda: case.expected] if case.expected else []), *case.make.values()]:
        try:
            return make()().clone()
        except Exception as reason:  # reported where the implementation is timed
            reasons.append(summary(reason))
    raise RuntimeError(f"no implementation can run: {'; '.join(reasons)}")


def _check_device(device: torch.device, what: str) -> None:
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except Exception as error:
            raise RuntimeError(f"the device stopped responding in {what}: {summary(error)}") from error


def to_entry(
    row: Row,
    impl: str,
    work: RequiredWork,
    found: Measurement,
    error: float | None,
    dtype: torch.dtype,
    gpu: dict[str, Any] | None,
    floor: float | None,
) -> dict[str, Any]:
    """One element of `benchmarks` in the result file."""
    low, median, high = statistics.quantiles(found.seconds, n=4, method="inclusive")
    name, activity = dtype_name(dtype), found.activity
    extra = {
        "tokens": work.tokens,
        "bytes": work.bytes,
        "flops": work.flops,
        **rates(work, median, name, gpu),
        "peak_memory_bytes": found.peak_memory_bytes,
        "cpu_seconds": statistics.median(found.cpu_seconds),
        "share_of_floor": None if floor is None else floor / median,
        "error": error,
        "tolerance": TOLERANCES[dtype],
        "versions": versions(),
    }
    if activity is not None:
        extra |= {
            "gpu_busy_seconds": activity.busy_seconds,
            "kernels": activity.kernels,
            "launches": activity.launches,
            "slowest_kernels": activity.slowest,
        }
    return {
        "group": row.group,
        "name": f"{row.name} {impl}",
        "params": {"impl": impl, "shape": row.shape, "dtype": name},
        "stats": {"median": median, "q1": low, "q3": high, "rounds": len(found.seconds)},
        "extra_info": extra,
    }


def to_line(entry: dict[str, Any]) -> str:
    """One printed line: wall, CPU, GPU busy, kernels, launches, share of the floor, rate."""
    extra = entry["extra_info"]
    parts = [f"wall {in_ms(entry['stats']['median'])}", f"CPU {in_ms(extra['cpu_seconds'])}"]
    if (busy := extra.get("gpu_busy_seconds")) is not None:
        parts.append(f"GPU busy {in_ms(busy)}, {extra['kernels']} kernels, {extra['launches']} launches")
    if extra["share_of_floor"] is not None:
        parts.append(f"share of floor {extra['share_of_floor']:.0%}")
    if extra["flops"]:
        parts.append(f"{extra['tflop_per_s']:.3g} TFLOP/s")
    parts.append(f"{extra['gb_per_s']:.3g} GB/s")
    if extra["error"] is not None and extra["error"] > extra["tolerance"]:
        parts.append(f"WRONG: relative error {extra['error']:.2g}, allowed {extra['tolerance']:.2g}")
    return f"  {entry['params']['impl']:30} {'; '.join(parts)}"


def in_ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds * 1e3:.0f} ms"


def run_gpu(path: Path, minutes: float, small: bool) -> int:
    """The command: needs a GPU, except with `small`, which tests everything on the CPU as well."""
    from .rows import all_rows

    has_gpu = torch.cuda.is_available() and not is_interpreting()
    if not has_gpu and not small:
        reason = "TRITON_INTERPRET=1 is set" if is_interpreting() else "torch finds none"
        raise ValueError(f"bench --gpu needs a GPU, and {reason}; --small runs small sizes on the CPU, to test the command")
    device, dtype = (torch.device("cuda"), torch.bfloat16) if has_gpu else (torch.device("cpu"), torch.float32)
    if small:
        print("small sizes, to test the command: the times mean nothing")
    box = TimeBox(60 * minutes)
    try:
        result = run_rows(all_rows(small, dtype, device), box, path, dtype, device)
    except (KeyboardInterrupt, RuntimeError):
        print(f"stopped; the results so far are in {path}", file=sys.stderr)
        raise
    print(f"{len(result.benchmarks)} measurements in {result.seconds:.0f} s, in {path}")
    for name in result.left_out:
        print(f"left out, because it did not fit into {minutes:g} minutes: {name}")
    for name, reason in result.failed.items():
        print(f"failed: {name}: {reason}")
    return int(bool(result.failed))
