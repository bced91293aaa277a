"""Times the stages of the whole model on this machine, against the other implementations and against a floor.

    python -m benchmarks.compare --stage all --out compare.json

The implementations take turns (A B C A B C ...), so that background load affects all of them. In `loading` each one runs all its
rounds before the next (A A B B). The first round is a warm-up and checks that all outputs are equal within the tolerance.

Printed per implementation: the median time, its spread (interquartile range / median), the speedup over each peer (median of the
ratios of single rounds) and the share of the floor (time of the floor / time). The floor is: the same matmuls by torch.mm and
torch.bmm alone; in `decode`, a sum over all bytes that a step must read; in `loading`, reading the file. The last line of each
case compares keye_kernels with the strongest peer.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from keye_kernels.tools.timing import stages
from keye_kernels.tools.timing.measuring import machine_info, relative_error, versions, with_peak_memory
from keye_kernels.tools.timing.models import build_model, make_config, saved_checkpoint
from keye_kernels.tools.timing.peers import Unavailable
from keye_kernels.tools.timing.shapes import IMAGE_GRIDS, SMALL_IMAGE_GRIDS
from keye_kernels.tools.timing.stages import KEYE_KERNELS, BenchmarkCase

STAGES = ("vision", "prefill", "decode", "first_token", "loading", "memory")
FLOOR = "floor"
CPU = torch.device("cpu")


def cases(stage: str, small: bool) -> Iterator[tuple[str, BenchmarkCase]]:
    """The named cases of a stage. A model is built when its case is reached, so that one model is in memory at a time."""

    def build(vision_layers: int | None, decoder_layers: int | None, dtype: torch.dtype = torch.float32) -> Any:
        config = make_config(small=small, vision_layers=vision_layers, decoder_layers=decoder_layers)
        return build_model(config, dtype, CPU)

    if stage == "vision":
        for name in SMALL_IMAGE_GRIDS if small else ("1_image_1024", "16_images_mixed"):
            yield name, stages.vision(build(None, 0), (SMALL_IMAGE_GRIDS | IMAGE_GRIDS)[name])
    if stage == "prefill":
        tokens = 48 if small else 1024
        yield f"{tokens}_tokens", stages.prefill(build(0, 2), 1, tokens)
    if stage == "decode":
        cached = 32 if small else 1024
        for batch_size in (1, 8):
            yield f"batch_{batch_size}_after_{cached}", stages.decode(build(0, 2), batch_size, cached)
    if stage == "first_token":
        grids, text_tokens = ([(1, 8, 8)], 16) if small else ([(1, 32, 32)], 256)
        yield "1_image", stages.first_token(build(None, 2), grids, text_tokens)
    if stage == "loading":
        with saved_checkpoint(build(None, 2, torch.bfloat16)) as path:
            for dtype in (torch.float32, torch.bfloat16):
                name = f"bfloat16_as_{dtype}".replace("torch.", "")
                yield name, stages.loading(path, CPU, dtype)
    if stage == "memory":
        # The peak does not depend on the number of layers, so two are enough
        grids, tokens = ([(1, 8, 8)] * 4, 48) if small else ([(1, 32, 32)] * 16, 1024)
        yield f"prefill_{tokens}_tokens", stages.prefill(build(0, 2), 1, tokens)
        yield f"vision_{len(grids)}_images", stages.vision(build(2, 0), grids)


def checked_calls(case: BenchmarkCase) -> dict[str, Callable[[], Any]]:
    """The calls of all implementations that are available here, after one call of each.

    Raises:
        SystemExit: the output of an implementation differs from the output of the first one by more than the tolerance.
    """
    calls, expected = {}, None
    for name, make in case.make.items():
        try:
            calls[name] = make()
        except Unavailable as reason:
            print(f"  skipped: {reason}", flush=True)
            continue
        output = calls[name]()
        expected = output.clone() if expected is None else expected
        error = relative_error(output, expected)
        if not error <= stages.TOLERANCE:
            raise SystemExit(
                f"{name} differs from {next(iter(calls))} by a relative error of {error:.2g}, "
                f"at most {stages.TOLERANCE:.2g} is allowed: not timed"
            )
    return calls


def spread(values: list[float]) -> float:
    """Interquartile range / median."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


def time_case(case: BenchmarkCase, rounds: int, take_turns: bool = True) -> dict[str, list[float]]:
    """Seconds of every round, for each implementation and the floor."""
    calls = checked_calls(case)
    if case.floor is not None:
        calls[FLOOR] = case.floor()
        calls[FLOOR]()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for name in [*calls] * rounds if take_turns else [name for name in calls for _ in range(rounds)]:
        start = time.perf_counter()
        calls[name]()
        seconds[name].append(time.perf_counter() - start)
    return seconds


def summarize(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, spreads, speedups and shares of the floor from the seconds of every round.

    Returns:
        `{"strongest_peer": name, "implementations": {name: {"seconds", "median", "spread", "speedup_over",
        "share_of_floor"}}}`. `speedup_over` is `{peer: {"median", "spread"}}`. The strongest peer is the fastest one.
    """
    peers = [name for name in seconds if name not in (KEYE_KERNELS, FLOOR)]

    def summary(name: str) -> dict[str, Any]:
        def ratios_to(other: str) -> list[float]:
            return [theirs / own for theirs, own in zip(seconds[other], seconds[name], strict=True)]

        over = {peer: ratios_to(peer) for peer in peers}
        return {
            "seconds": seconds[name],
            "median": statistics.median(seconds[name]),
            "spread": spread(seconds[name]),
            "speedup_over": {
                peer: {"median": statistics.median(ratios), "spread": spread(ratios)} for peer, ratios in over.items()
            },
            "share_of_floor": statistics.median(ratios_to(FLOOR)) if FLOOR in seconds else None,
        }

    return {
        "strongest_peer": min(peers, key=lambda name: statistics.median(seconds[name]), default=None),
        "implementations": {name: summary(name) for name in seconds},
    }


def measure_memory(case: BenchmarkCase) -> dict[str, Any]:
    """Peak of the memory that each implementation allocates. The strongest peer is the one with the lowest peak."""
    calls = checked_calls(case)
    peaks = {name: with_peak_memory(call, CPU)[1] for name, call in calls.items()}
    peers = {name: peak for name, peak in peaks.items() if name != KEYE_KERNELS}
    return {
        "strongest_peer": min(peers, key=peers.__getitem__, default=None),
        "implementations": {name: {"peak_memory_bytes": peak} for name, peak in peaks.items()},
    }


def machine() -> dict[str, Any]:
    """CPU, GPU, threads, load and versions."""
    return machine_info() | {
        "threads": torch.get_num_threads(),
        "load_at_start": os.getloadavg()[0],
        "versions": versions(),
    }


def times_to_text(results: dict[str, Any]) -> str:
    """A table of one case, and the comparison with the strongest peer."""
    found = results["implementations"]
    peers = list(next(iter(found.values()))["speedup_over"])
    lines = [
        f"  {'':20} {'median':>12} {'spread':>8}"
        + "".join(f"  {'vs ' + peer:>22}" for peer in peers)
        + f"  {'share of floor':>14}"
    ]
    for name, r in found.items():
        line = f"  {name:20} {r['median'] * 1e3:9.1f} ms {r['spread']:8.1%}"
        line += "".join(f"  {r['speedup_over'][peer]['median']:21.2f}x" for peer in peers)
        lines.append(line if r["share_of_floor"] is None else f"{line}  {r['share_of_floor']:14.1%}")
    strongest = results["strongest_peer"]
    if strongest is not None and KEYE_KERNELS in found:
        ratio = found[KEYE_KERNELS]["speedup_over"][strongest]
        lines.append(
            f"  strongest peer: {strongest}; speedup of keye_kernels over it: {ratio['median']:.2f}x "
            f"(spread {ratio['spread']:.1%})"
        )
    return "\n".join(lines)


def memory_to_text(results: dict[str, Any]) -> str:
    """The peaks of one case, and the comparison with the strongest peer."""
    peaks = {name: r["peak_memory_bytes"] for name, r in results["implementations"].items()}
    lines = [f"  {name:20} {peak / 2**20:9.1f} MiB" for name, peak in peaks.items()]
    strongest = results["strongest_peer"]
    if strongest is not None and KEYE_KERNELS in peaks:
        share = peaks[KEYE_KERNELS] / peaks[strongest]
        lines.append(f"  strongest peer: {strongest}; peak of keye_kernels / its peak: {share:.2f}")
    return "\n".join(lines)


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each implementation (default: 7)")
    parser.add_argument("--small", action="store_true", help="small sizes, to test the command; the times mean nothing")
    parser.add_argument("--out", type=Path, help="write all results to this JSON file")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2 to compute a spread, got {options.rounds}")
    found: dict[str, Any] = {"machine": machine(), "rounds": options.rounds, "small": options.small, "stages": {}}
    for stage in STAGES if options.stage == "all" else [options.stage]:
        found["stages"][stage] = {}
        for name, case in cases(stage, options.small):
            print(f"{stage}, {name}", flush=True)
            if stage == "memory":
                results = measure_memory(case)
                print(memory_to_text(results), flush=True)
            else:
                # In `loading`, memory that one implementation frees goes back to the host of a virtual machine. Taking turns
                # would time how fast the host provides it again.
                results = summarize(time_case(case, options.rounds, take_turns=stage != "loading"))
                print(times_to_text(results), flush=True)
            found["stages"][stage][name] = results
            if options.out is not None:
                options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
