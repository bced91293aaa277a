"""Results of pytest-benchmark and of `bench --counted`, read from their JSON files; docs/benchmarks.md names the fields."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BASELINES = ("official", "reference")  # what speed-ups are against, the first that is there
Key = tuple[str, str, str, str]  # group, shape, dtype, impl


@dataclass(frozen=True)
class Timing:
    """One timed case; seconds are medians, with the quartiles around them."""

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
class Result:
    """One file. `interpreted` cases ran in Triton's interpreter: they are named, never shown as speed."""

    file: str
    timings: list[Timing]
    machine: dict[str, str]
    versions: dict[str, str]
    has_gpu: bool
    interpreted: list[str] = field(default_factory=list)

    def baseline(self, timing: Timing) -> Timing | None:
        """The timing of the same work that speed-ups are against."""
        found = {other.impl: other for other in self.timings if other.key[:3] == timing.key[:3]}
        return next((found[name] for name in BASELINES if name in found), None)


def read_results(files: Sequence[str], select: str | None = None) -> tuple[list[Result], dict[str, Any] | None]:
    """The timed results, one or two, and the counted one if there is one; `select` is a part of a group's or case's name.

    Raises: OSError for a file that cannot be read; ValueError for other JSON, for files of a wrong number, and where nothing
        was timed or `select` matches nothing.
    """
    contents = [(file, _read(file)) for file in files]
    counted = [content for _, content in contents if "traffic" in content]
    timed = [(file, content) for file, content in contents if "traffic" not in content]
    if not 1 <= len(timed) <= 2 or len(counted) > 1:
        raise ValueError(
            "a report takes one or two files of `pytest benchmarks/ --benchmark-json FILE` and at most one of "
            f"`keye-kernels bench --counted --json`, got {len(timed)} and {len(counted)}"
        )
    return [_result(file, content, select) for file, content in timed], counted[0] if counted else None


def differences(one: Result, other: Result) -> list[str]:
    """What makes two results hard to compare: other machines, other versions, cases that only one of them has."""
    found = []
    for what, first, second in (("machine", one.machine, other.machine), ("version", one.versions, other.versions)):
        for name in sorted(first.keys() | second.keys()):
            if first.get(name) != second.get(name):
                found.append(
                    f"another {what}: {name} is {first.get(name)} in {one.file}, {second.get(name)} in {other.file}"
                )
    alone = {timing.key for timing in one.timings} ^ {timing.key for timing in other.timings}
    if alone:
        found.append(f"{len(alone)} cases are in one of the two files only and are not compared")
    return found


def _read(file: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict) or not ({"benchmarks", "traffic"} & content.keys()):
        raise ValueError(f"{file} is neither a result of pytest-benchmark nor of `keye-kernels bench --counted --json`")
    return content


def _result(file: str, content: dict[str, Any], select: str | None) -> Result:
    if not content["benchmarks"]:
        raise ValueError(
            f"{file} holds no timed case: what was selected with pytest's -k or paths matched nothing that can run here, "
            "or --benchmark-disable was set"
        )
    chosen = [case for case in content["benchmarks"] if not select or select in f"{case['group']} {case['name']}"]
    if not chosen:
        groups = sorted({str(case["group"]) for case in content["benchmarks"]})
        raise ValueError(f"--select {select!r} matched nothing in {file}, which has the groups {', '.join(groups)}")
    machine = content.get("machine_info") or {}
    gpu, cpu = machine.get("gpu"), machine.get("cpu") or {}
    shown = {
        "GPU": str(gpu["name"]) if gpu else "none",
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
        timings.append(
            Timing(
                group=str(case["group"]),
                impl=impl,
                shape=str(params.get("shape", "")),
                dtype=str(params.get("dtype", "")),
                seconds=stats["median"],
                quartiles=(stats["q1"], stats["q3"]),
                extra=extra,
            )
        )
    if not timings:
        raise ValueError(f"{file} holds only times of Triton's interpreter, which say nothing about speed")
    return Result(Path(file).name, timings, shown, versions, bool(gpu), interpreted)
