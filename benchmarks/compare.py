"""The whole model against the official arithmetic and against the floor, on this machine, in one run.

    python -m benchmarks.compare --stage all --out compare.json

Contestants take turns, round by round (A B C A B C ...; in loading A A B B C C), so that whatever else the machine does meets
all of them. A first round warms up and checks that all put out the same. Printed are medians, their spread (interquartile
range over median), the ratio to the baseline, taken round by round, and the share of the floor. The floor is the same products
by torch.mm and torch.bmm and nothing else; for decoding, a sum over all bytes that a step must read; for loading, reading the
file.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from . import stages
from .measuring import gpu_info, relative_error, versions, with_peak_memory
from .peers import Unavailable
from .shapes import PICTURES, SMALL_PICTURES

STAGES = ("vision", "prefill", "decode", "first_token", "loading", "memory")
MEMORY_PATCHES = [(1, 32, 32)] * 16


def cases(stage: str, small: bool) -> Iterator[tuple[str, stages.Case]]:
    """The named cases of a stage, each built when its turn comes. A peak does not depend on the number of layers: two do."""
    dtype, device = torch.float32, torch.device("cpu")

    def build(tower: int | None, decoder: int | None, dtype: torch.dtype = dtype) -> Any:
        return stages.build(stages.config(small=small, tower_layers=tower, decoder_layers=decoder), dtype, device)

    if stage == "vision":
        for name in SMALL_PICTURES if small else ("1_image_1024", "16_images_mixed"):
            yield name, stages.vision(build(None, 0), (SMALL_PICTURES | PICTURES)[name])
    if stage == "prefill":
        tokens = 48 if small else 1024
        yield f"{tokens}_tokens", stages.prefill(build(0, 2), 1, tokens)
    if stage == "decode":
        cached = 32 if small else 1024
        for rows in (1, 8):
            yield f"batch_{rows}_after_{cached}", stages.decode(build(0, 2), rows, cached)
    if stage == "first_token":
        grids, text = ([(1, 8, 8)], 16) if small else ([(1, 32, 32)], 256)
        yield "1_image", stages.first_token(build(None, 2), grids, text)
    if stage == "loading":
        with stages.checkpoint(build(None, 2, torch.bfloat16)) as path:
            for wanted in (torch.float32, torch.bfloat16):
                name = f"bfloat16_as_{wanted}".replace("torch.", "")
                yield name, stages.loading(path, device, wanted)
    if stage == "memory":
        grids, tokens = ([(1, 8, 8)] * 4, 48) if small else (MEMORY_PATCHES, 1024)
        yield f"prefill_{tokens}_tokens", stages.prefill(build(0, 2), 1, tokens)
        yield f"vision_{len(grids)}_images", stages.vision(build(2, 0), grids)


def ready(case: stages.Case) -> dict[str, Callable[[], Any]]:
    """The calls of all contestants that run here, checked against the first one; its name is that of the baseline."""
    calls, expected = {}, None
    for name, make in case.make.items():
        try:
            calls[name] = make()
        except Unavailable as reason:
            print(f"  {name}: left out: {reason}", flush=True)
            continue
        output = calls[name]()
        expected = output.clone() if expected is None else expected
        error = relative_error(output, expected)
        if not error <= stages.TOLERANCE:
            raise SystemExit(f"{name} deviates from {next(iter(calls))} by {error:.2g} of the largest value: not timed")
    return calls


def spread(values: list[float]) -> float:
    """Interquartile range over median."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


def race(case: stages.Case, rounds: int, in_turns: bool = True) -> dict[str, Any]:
    """Seconds of every contestant and of the floor, in turns or one after the other, and what follows from them."""
    calls = ready(case)
    baseline = next(iter(calls))
    if case.floor is not None:
        calls["floor"] = case.floor()
        calls["floor"]()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for name in [*calls] * rounds if in_turns else [name for name in calls for _ in range(rounds)]:
        start = time.perf_counter()
        calls[name]()
        seconds[name].append(time.perf_counter() - start)
    return {name: _summary(seconds, name, baseline) for name in seconds}


def _summary(seconds: dict[str, list[float]], name: str, baseline: str) -> dict[str, Any]:
    ratios = [b / own for b, own in zip(seconds[baseline], seconds[name], strict=True)]
    floors = [f / own for f, own in zip(seconds.get("floor", []), seconds[name], strict=False)]
    return {
        "seconds": seconds[name],
        "median": statistics.median(seconds[name]),
        "spread": spread(seconds[name]),
        "ratio_to_baseline": statistics.median(ratios),
        "ratio_spread": spread(ratios),
        "share_of_floor": statistics.median(floors) if floors else None,
    }


def weigh(case: stages.Case) -> dict[str, Any]:
    """Peak memory of every contestant's call above what was held before it."""
    calls = ready(case)
    peaks = {name: with_peak_memory(call, torch.device("cpu"))[1] for name, call in calls.items()}
    baseline = next(iter(peaks.values()))
    return {name: {"peak_memory_bytes": peak, "ratio_to_baseline": peak / baseline} for name, peak in peaks.items()}


def machine() -> dict[str, Any]:
    names = [line.partition(":")[2].strip() for line in _cpu_lines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": os.getloadavg()[0],
        "gpu": gpu_info(),
        "versions": versions(),
    }


def _cpu_lines() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []


def print_times(results: dict[str, Any]) -> None:
    print("  contestant        median     spread   x baseline  (spread)   of the floor")
    for name, r in results.items():
        share = "" if r["share_of_floor"] is None else f"{r['share_of_floor']:8.1%}"
        print(
            f"  {name:14} {r['median'] * 1e3:9.1f} ms {r['spread']:8.1%} {r['ratio_to_baseline']:11.2f} "
            f"{r['ratio_spread']:10.1%}    {share}",
            flush=True,
        )


def print_memory(results: dict[str, Any]) -> None:
    for name, r in results.items():
        print(
            f"  {name:14} {r['peak_memory_bytes'] / 2**20:9.1f} MiB {r['ratio_to_baseline']:8.2f} x baseline",
            flush=True,
        )


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--small", action="store_true", help="small sizes, to see that it runs; the numbers mean nothing"
    )
    parser.add_argument("--out", type=Path, help="JSON file for everything measured")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2, for a spread, got {options.rounds}")
    found: dict[str, Any] = {"machine": machine(), "rounds": options.rounds, "small": options.small, "stages": {}}
    for stage in STAGES if options.stage == "all" else [options.stage]:
        found["stages"][stage] = {}
        for name, case in cases(stage, options.small):
            print(f"{stage}, {name}", flush=True)
            # A virtual machine hands freed memory back: a load beside others would time how fast the host gives it again
            results = weigh(case) if stage == "memory" else race(case, options.rounds, in_turns=stage != "loading")
            (print_memory if stage == "memory" else print_times)(results)
            found["stages"][stage][name] = results
            if options.out is not None:
                options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
