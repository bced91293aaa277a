"""`keye-kernels bench`: times on a GPU, counted work (without a GPU), a report of timed results, throughput of packed batches."""

import argparse
import json
import sys
from pathlib import Path

DEFAULT_MINUTES = 3.75  # together with the start of the process, less than 4
DEFAULT_RESULT = "bench_gpu.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    mode = parser.add_mutually_exclusive_group(required=True)
    counted_help = "count bytes, FLOPs and launches, and analyse machine code; needs no GPU, takes about a minute"
    mode.add_argument("--counted", action="store_true", help=counted_help)
    gpu_help = "time operators and stages of the model on this GPU, beside other implementations"
    mode.add_argument("--gpu", action="store_true", help=gpu_help)
    mode.add_argument("--report", metavar="DIR", help="write DIR/index.html, a page with plots of the RESULT.json files")
    mode.add_argument("--load", action="store_true", help="measure the throughput of batches packed by FLOPs")
    results_help = (
        "with --report: one or two files of `bench --gpu` or of `pytest benchmarks/ --benchmark-json`, and one of "
        "`bench --counted --json`"
    )
    add = parser.add_argument
    add("results", nargs="*", metavar="RESULT.json", help=results_help)
    add("--select", metavar="TEXT", help="with --report: only groups and cases with TEXT in their name")
    add("--force", action="store_true", help="with --report or --gpu: overwrite an existing page or result")
    minutes_help = f"with --gpu: leave out what does not fit into this time (default: {DEFAULT_MINUTES})"
    add("--minutes", type=float, metavar="N", help=minutes_help)
    add("--out", metavar="FILE", help=f"with --gpu: the result file (default: {DEFAULT_RESULT})")
    add("--small", action="store_true", help="with --gpu: small sizes, also without a GPU, to test the command")
    add("--target", default="sm_80,sm_90,sm_100", help="with --counted: GPU architectures to compile for, or none")
    add("--requests", type=int, default=48, metavar="N", help="with --load: number of requests to run (default: 48)")
    add("--devices", type=int, default=8, metavar="N", help="with --load: number of simulated devices (default: 8)")
    add("--seed", type=int, default=0, metavar="N", help="with --load: seed of the random requests")
    add("--json", action="store_true", help="with --counted or --load: print JSON")


def run(options: argparse.Namespace) -> int:
    """Runs the command. Returns 1 if a counted kernel exceeds its limit or an implementation cannot be timed, else 0."""
    if options.results and not options.report:
        raise ValueError(f"result files need --report DIR, got {', '.join(options.results)} without it")
    for name in ("minutes", "out", "small"):
        if not options.gpu and getattr(options, name) not in (None, False):
            raise ValueError(f"--{name} needs --gpu")
    if options.report:
        return _report(options)
    if options.gpu:
        return _gpu(options)
    return _counted(options) if options.counted else _load(options)


def _gpu(options: argparse.Namespace) -> int:
    from keye_kernels.tools.timing.gpu import run_gpu

    minutes, path = DEFAULT_MINUTES if options.minutes is None else options.minutes, Path(options.out or DEFAULT_RESULT)
    if not 0 < minutes < float("inf"):
        raise ValueError(f"--minutes must be a positive number, got {minutes:g}")
    if path.exists() and not options.force:
        raise FileExistsError(f"{path} exists: choose another file with --out, or overwrite it with --force")
    return run_gpu(path, minutes, options.small)


def _counted(options: argparse.Namespace) -> int:
    from .counted import count, exceeds_limits, to_text

    found = count([] if options.target == "none" else options.target.split(","))
    print(json.dumps(found, indent=2) if options.json else to_text(found))
    return int(exceeds_limits(found))


def _report(options: argparse.Namespace) -> int:
    from .report import warnings, write_report
    from .results import read_results

    results, counted_work = read_results(options.results, options.select)
    for text in warnings(results):
        print(f"keye-kernels bench: warning: {text}", file=sys.stderr)
    print(f"Wrote {write_report(options.report, results, counted_work, options.force)}")
    return 0


def _load(options: argparse.Namespace) -> int:
    from keye_kernels.model import KeyeConfig

    from .load import measure, simulate, to_text

    simulated = simulate(KeyeConfig(), options.devices, options.seed)
    measured = measure(options.requests, options.seed)
    print(json.dumps({"measured": measured, "simulated": simulated}, indent=2) if options.json else to_text(measured, simulated))
    return 0
