"""Times the stages of the whole model on this machine, against the other implementations and against a floor.

    python -m benchmarks.compare --stage all --out compare.json

The implementations take turns (A B C A B C ...), so that background load affects all of them. In `loading` each one runs all its
rounds before the next (A A B B). The first round is a warm-up and checks that all outputs are equal within the tolerance.

Printed per implementation: the median time, its spread (interquartile range / median), the speedup over each peer (median of the
ratios of single rounds) and the share of the floor (time of the floor / time); on a GPU also the time in which it is busy, the
kernels, and the launches by the CPU, from torch's profiler in the same run. The floor is: the same matmuls by torch alone; in
`decode`, a sum over all bytes that a step must read; in `loading`, reading the file. The last line of each case compares
keye_kernels with the strongest peer.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from keye_kernels.tools.timing import images, stages
from keye_kernels.tools.timing.clock import WARM_UP_CALLS, timed_call
from keye_kernels.tools.timing.measuring import machine_info, relative_error, versions, with_peak_memory
from keye_kernels.tools.timing.models import build_model, make_config, saved_checkpoint
from keye_kernels.tools.timing.peers import Unavailable
from keye_kernels.tools.timing.profiling import GpuActivity, profiled
from keye_kernels.tools.timing.shapes import IMAGE_GRIDS, PHOTOS, SMALL_IMAGE_GRIDS, SMALL_PHOTOS
from keye_kernels.tools.timing.stages import KEYE_KERNELS, BenchmarkCase
from keye_kernels.triton.launch_config import write_atomically

STAGES = ("vision", "images", "prefill", "decode", "first_token", "loading", "memory")
FLOOR = "floor"
CPU = torch.device("cpu")


def cases(stage: str, small: bool, device: torch.device = CPU) -> Iterator[tuple[str, BenchmarkCase]]:
    """The named cases of a stage. A model is built when its case is reached, so that one model is in memory at a time.

    On a GPU, the decoder has all its layers.
    """
    on_gpu = device.type == "cuda"
    layers = None if on_gpu else 2

    def build(vision_layers: int | None, decoder_layers: int | None, dtype: torch.dtype | None = None) -> Any:
        config = make_config(small=small, vision_layers=vision_layers, decoder_layers=decoder_layers)
        return build_model(config, dtype or stage_dtype(device), device)

    if stage == "vision":
        large = ("1_image_1024", "16_images_mixed", *(["64_frames_448"] if on_gpu else []))
        for name in SMALL_IMAGE_GRIDS if small else large:
            yield name, stages.vision(build(None, 0), (SMALL_IMAGE_GRIDS | IMAGE_GRIDS)[name])
    if stage == "images":
        for name, photos in (SMALL_PHOTOS if small else PHOTOS).items():
            yield f"{name}_to_patches", images.preprocessing(photos)
            if on_gpu or photos.count == 1 or small:
                yield f"{name}_to_projector", images.images(build(None, 0), photos)
    if stage == "prefill":
        for tokens in (48,) if small else (1024, 8192) if on_gpu else (1024,):
            yield f"{tokens}_tokens", stages.prefill(build(0, layers), 1, tokens)
    if stage == "decode":
        cached = 32 if small else 1024
        for batch_size in (1, 8):
            yield f"batch_{batch_size}_after_{cached}", stages.decode(build(0, layers), batch_size, cached)
    if stage == "first_token":
        grids, text_tokens = ([(1, 8, 8)], 16) if small else ([(1, 32, 32)], 256)
        yield "1_image", stages.first_token(build(None, layers), grids, text_tokens)
    if stage == "loading":
        with saved_checkpoint(build(None, 2, torch.bfloat16)) as path:
            for dtype in (torch.float32, torch.bfloat16):
                name = f"bfloat16_as_{dtype}".replace("torch.", "")
                yield name, stages.loading(path, device, dtype)
    if stage == "memory":
        # The peak does not depend on the number of layers, so two are enough
        grids, tokens = ([(1, 8, 8)] * 4, 48) if small else ([(1, 32, 32)] * 16, 1024)
        yield f"prefill_{tokens}_tokens", stages.prefill(build(0, 2), 1, tokens)
        yield f"vision_{len(grids)}_images", stages.vision(build(2, 0), grids)


def stage_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def checked_calls(case: BenchmarkCase, device: torch.device = CPU) -> dict[str, Callable[[], Any]]:
    """The calls of all implementations that are available here, after one call of each; on a GPU, after some more.

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
        tolerance = stages.TOLERANCES[stage_dtype(device)]
        if not error <= tolerance:
            raise SystemExit(
                f"{name} differs from {next(iter(calls))} by a relative error of {error:.2g}, "
                f"at most {tolerance:.2g} is allowed: not timed"
            )
        for _ in range(WARM_UP_CALLS if device.type == "cuda" else 0):  # the second and third calls prepare later ones
            calls[name]()
    return calls


def spread(values: list[float]) -> float:
    """Interquartile range / median."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


def time_case(
    case: BenchmarkCase, rounds: int, take_turns: bool = True, device: torch.device = CPU
) -> tuple[dict[str, list[float]], dict[str, GpuActivity | None]]:
    """Seconds of every round, for each implementation and the floor; and what the GPU does, None if unknown."""
    calls = checked_calls(case, device)
    if case.floor is not None:
        calls[FLOOR] = case.floor()
        calls[FLOOR]()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for name in [*calls] * rounds if take_turns else [name for name in calls for _ in range(rounds)]:
        seconds[name].append(timed_call(calls[name], device)[0])
    return seconds, {name: profiled(call, device) for name, call in calls.items()}


def summarize(
    seconds: dict[str, list[float]], activities: Mapping[str, GpuActivity | None] = MappingProxyType({})
) -> dict[str, Any]:
    """Medians, spreads, speedups and shares of the floor from the seconds of every round, and the work of the GPU.

    Returns:
        `{"strongest_peer": name, "implementations": {name: {"seconds", "median", "spread", "speedup_over",
        "share_of_floor", "gpu"}}}`. `speedup_over` is `{peer: {"median", "spread"}}`; `gpu` has the fields of `GpuActivity`, or
        is None on a CPU. The strongest peer is the fastest one.
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
            "gpu": None if activities.get(name) is None else asdict(activities[name]),
        }

    return {
        "strongest_peer": min(peers, key=lambda name: statistics.median(seconds[name]), default=None),
        "implementations": {name: summary(name) for name in seconds},
    }


def measure_memory(case: BenchmarkCase, device: torch.device = CPU) -> dict[str, Any]:
    """Peak of the memory that each implementation allocates. The strongest peer is the one with the lowest peak."""
    calls = checked_calls(case, device)
    peaks = {name: with_peak_memory(call, device)[1] for name, call in calls.items()}
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
    has_gpu = all(r["gpu"] for r in found.values())
    width = max(20, *map(len, found))
    gpu_head = f"{'GPU busy':>13} {'kernels':>8} {'launches':>9}" if has_gpu else ""
    lines = [
        f"  {'':{width}} {'median':>13} {'spread':>8} {gpu_head}"
        + "".join(f"  {'vs ' + peer:>22}" for peer in peers)
        + f"  {'share of floor':>14}"
    ]
    for name, r in found.items():
        line = f"  {name:{width}} {r['median'] * 1e3:10.2f} ms {r['spread']:8.1%} "
        if has_gpu:
            line += f"{r['gpu']['busy_seconds'] * 1e3:10.2f} ms {r['gpu']['kernels']:8} {r['gpu']['launches']:9}"
        line += "".join(f"  {r['speedup_over'][peer]['median']:{max(22, len(peer) + 3) - 1}.2f}x" for peer in peers)
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
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="default: the GPU if there is one")
    parser.add_argument("--small", action="store_true", help="small sizes, to test the command; the times mean nothing")
    parser.add_argument("--out", type=Path, help="write all results to this JSON file")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2 to compute a spread, got {options.rounds}")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and torch finds none")
    found: dict[str, Any] = {
        "machine": machine(),
        "device": device.type,
        "rounds": options.rounds,
        "small": options.small,
        "stages": {},
    }
    for stage in STAGES if options.stage == "all" else [options.stage]:
        found["stages"][stage] = {}
        for name, case in cases(stage, options.small, device):
            print(f"{stage}, {name}", flush=True)
            if stage == "memory":
                results = measure_memory(case, device)
                print(memory_to_text(results), flush=True)
            else:
                # In `loading`, memory that one implementation frees goes back to the host of a virtual machine. Taking turns
                # would time how fast the host provides it again.
                results = summarize(*time_case(case, options.rounds, stage != "loading", device))
                print(times_to_text(results), flush=True)
            found["stages"][stage][name] = results
            if options.out is not None:
                write_atomically(options.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
