"""Reads result files of `bench --gpu`, `pytest benchmarks/` and `bench --counted`. docs/benchmarks.md describes the fields."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keye_kernels.tools.running import summary

from . import counted

JSON_TYPES = {dict: "an object", list: "a list of objects", str: "a string", float: "a positive number"}
# Fields of extra_info
NUMBERS = (
    "tokens", "gb_per_s", "tflop_per_s", "roofline_share", "peak_memory_bytes", "cpu_seconds", "gpu_busy_seconds", "kernels",
    "launches", "share_of_floor",
)  # fmt: skip
# Speedups are relative to the first one that was timed
BASELINES = ("official (eager)", "reference", "transformers + SDPA", "stock + SDPA", "torch FlashAttention")
COMMANDS = "`keye-kernels bench --gpu`, `pytest benchmarks/ --benchmark-json` or `keye-kernels bench --counted --json`"
Key = tuple[str, str, str, str]  # group, shape, dtype, impl


@dataclass(frozen=True)
class Timing:
    """One timed case: the median in seconds and the quartiles."""

    group: str
    impl: str
    shape: str
    dtype: str
    seconds: float
    quartiles: tuple[float, float]
    extra: dict[str, Any]

    @property
    def key(self) -> Key:
        return self.group, self.shape, self.dtype, self.impl


@dataclass(frozen=True)
class BenchmarkResult:
    """One result file.

    `interpreted` are the names of cases that ran in Triton's interpreter; their times are dropped. `missing` are sentences about
    cases that were not timed.
    """

    file: str
    timings: list[Timing]
    machine: dict[str, str]
    versions: dict[str, str]
    has_gpu: bool
    interpreted: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def baseline(self, timing: Timing) -> Timing | None:
        """The timing of the baseline for the same group, shape and dtype."""
        found = {other.impl: other for other in self.timings if other.key[:3] == timing.key[:3]}
        return next((found[name] for name in BASELINES if name in found), None)


def read_results(files: Sequence[str], select: str | None = None) -> tuple[list[BenchmarkResult], dict[str, Any] | None]:
    """Reads one or two timed results, and at most one counted result (else None); the files may come in any order.

    Keeps only the cases with `select` in the name of the group or the case. Raises OSError if a file cannot be read, and
    ValueError if it is not a result, the number of files is wrong, nothing was timed, or `select` matches nothing.
    """
    contents = [(file, _read(file)) for file in files]
    counted_work = [content for _, content in contents if "traffic" in content]
    timed = [(file, content) for file, content in contents if "traffic" not in content]
    if not 1 <= len(timed) <= 2 or len(counted_work) > 1:
        raise ValueError(
            "a report takes one or two files of `keye-kernels bench --gpu` or `pytest benchmarks/ --benchmark-json FILE`, and "
            f"at most one of `keye-kernels bench --counted --json`, got {len(timed)} and {len(counted_work)}"
        )
    return [_result(file, content, select) for file, content in timed], counted_work[0] if counted_work else None


def differences(one: BenchmarkResult, other: BenchmarkResult) -> list[str]:
    """Differences of machine, versions and cases that make two results hard to compare."""
    found = []
    for what, first, second in (("machine", one.machine, other.machine), ("version", one.versions, other.versions)):
        for name in sorted(first.keys() | second.keys()):
            if first.get(name) != second.get(name):
                found.append(f"different {what}: {name} is {first.get(name)} in {one.file}, {second.get(name)} in {other.file}")
    alone = {timing.key for timing in one.timings} ^ {timing.key for timing in other.timings}
    if alone:
        found.append(f"{len(alone)} cases are in only one of the two files and are not compared")
    return found


def _read(file: str) -> dict[str, Any]:
    try:
        # NaN and Infinity are not JSON; Python writes and reads them
        content = json.loads(Path(file).read_text(encoding="utf-8"), parse_constant=lambda name: None)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict) or not ({"benchmarks", "traffic"} & content.keys()):
        raise ValueError(f"{file} is not a result of {COMMANDS}")
    if "traffic" in content:
        try:
            counted.to_text(content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{file} is not a result of `keye-kernels bench --counted --json`: {summary(error)}") from error
    return content


def _check(parent: Any, where: str, kind: type, *names: str, optional: bool = False) -> None:
    """ValueError unless fields of a JSON object have a type. Numbers are finite; those that are not optional are above 0."""
    if not isinstance(parent, dict):
        raise ValueError(f"{where} must be an object, got {str(parent)[:60]!r}")
    for name in names:
        value = parent.get(name)
        is_valid = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
        is_valid = is_valid and (kind is not float or (math.isfinite(value) and (optional or value > 0)))
        if not is_valid and not (optional and value is None):
            raise ValueError(f"{where}: {name} must be {JSON_TYPES[kind]}, got {str(value)[:60]!r}")


def _check_case(case: Any, where: str) -> None:
    """ValueError unless the fields that the page shows have the types in docs/benchmarks.md."""
    _check(case, where, str, "group", "name")
    _check(case, where, dict, "params", "extra_info", optional=True)
    _check(case.get("stats"), f"{where}.stats", float, "median", "q1", "q3")
    extra = case.get("extra_info") or {}
    _check(extra, f"{where}.extra_info", dict, "versions", optional=True)
    _check(extra, f"{where}.extra_info", float, *NUMBERS, optional=True)


def _result(file: str, content: dict[str, Any], select: str | None) -> BenchmarkResult:
    _check(content, file, list, "benchmarks")
    _check(content, file, dict, "machine_info", "failed", optional=True)
    _check(content, file, list, "left_out", optional=True)
    cases, machine = content["benchmarks"], content.get("machine_info") or {}
    _check(machine, f"{file}: machine_info", dict, "gpu", "cpu", optional=True)
    for index, case in enumerate(cases):
        _check_case(case, f"{file}: benchmarks[{index}]")
    if not cases:
        raise ValueError(
            f"{file} contains no timed case: pytest's -k or paths selected no case that can run on that machine, "
            "or --benchmark-disable was set"
        )
    chosen = [case for case in cases if not select or select in f"{case['group']} {case['name']}"]
    if not chosen:
        groups = sorted({str(case["group"]) for case in cases})
        raise ValueError(f"--select {select!r} matched nothing in {file}, its groups are {', '.join(groups)}")
    gpu, cpu = machine.get("gpu"), machine.get("cpu") or {}
    shown = {
        "GPU": str(gpu.get("name", "unknown")) if gpu else "none",
        "CPU": str(cpu.get("brand_raw") or machine.get("processor") or machine.get("machine") or "unknown"),
        "cores": str(cpu.get("count", "unknown")),
        "system": f"{machine.get('system', '')} {machine.get('release', '')}".strip() or "unknown",
    }
    versions: dict[str, str] = {}
    timings, interpreted = [], []
    for case in chosen:
        params, extra, stats = case.get("params") or {}, case.get("extra_info") or {}, case["stats"]
        versions |= {name: str(text) for name, text in (extra.get("versions") or {}).items() if text}
        impl = str(params.get("impl", case["name"]))
        if impl == "triton" and not gpu:
            interpreted.append(case["name"])
            continue
        shape, dtype = (str(params.get(name, "")) for name in ("shape", "dtype"))
        timings.append(Timing(str(case["group"]), impl, shape, dtype, stats["median"], (stats["q1"], stats["q3"]), extra))
    if not timings:
        raise ValueError(f"{file} contains only times of Triton's interpreter, which are not reported")
    missing = [f"{name} failed: {reason}" for name, reason in (content.get("failed") or {}).items()]
    missing += [f"{name} was left out, to keep the limit of time" for name in content.get("left_out") or []]
    return BenchmarkResult(Path(file).name, timings, shown, versions, bool(gpu), interpreted, missing)
