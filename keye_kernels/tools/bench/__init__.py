"""`keye-kernels bench`: work counted without a GPU, a page of plots from timed results, throughput under load."""

import argparse
import json
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument(
        "--counted", action="store_true", help="bytes, multiplies, launches and machine code; takes minutes"
    )
    mode.add_argument("--report", metavar="DIR", help="write DIR/index.html with plots of RESULT.json")
    mode.add_argument("--load", action="store_true", help="serve a queue of mixed requests, packed by FLOPs")
    parser.add_argument(
        "results",
        nargs="*",
        metavar="RESULT.json",
        help="with --report: of pytest benchmarks/ --benchmark-json, one or two to compare; of --counted --json, one",
    )
    parser.add_argument("--select", metavar="TEXT", help="with --report: only groups or cases with TEXT in their names")
    parser.add_argument("--force", action="store_true", help="with --report: write over a page that is there")
    parser.add_argument("--target", default="sm_80,sm_90,sm_100", help="with --counted: chips, or none")
    parser.add_argument("--requests", type=int, default=48, metavar="N", help="with --load: served requests")
    parser.add_argument("--devices", type=int, default=8, metavar="N", help="with --load: simulated devices")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="with --load: of the stream of requests")
    parser.add_argument("--json", action="store_true", help="with --counted, --load: print one JSON object")


def run(options: argparse.Namespace) -> int:
    """The command; 1 where a count exceeds its limit."""
    if options.results and not options.report:
        raise ValueError(f"{', '.join(options.results)}: result files go with --report DIR")
    if options.report:
        return _report(options)
    return _counted(options) if options.counted else _load(options)


def _counted(options: argparse.Namespace) -> int:
    from .counted import count, exceeds_limits, to_text

    found = count([] if options.target == "none" else options.target.split(","))
    print(json.dumps(found, indent=2) if options.json else to_text(found))
    return int(exceeds_limits(found))


def _report(options: argparse.Namespace) -> int:
    from .report import warnings, write_report
    from .results import read_results

    results, counted = read_results(options.results, options.select)
    for text in warnings(results):
        print(f"keye-kernels bench: warning: {text}", file=sys.stderr)
    print(f"Written to {write_report(options.report, results, counted, options.force)}")
    return 0


def _load(options: argparse.Namespace) -> int:
    from keye_kernels.model import KeyeConfig

    from .load import measure, simulate, to_text

    simulated = simulate(KeyeConfig(), options.devices, options.seed)
    served = measure(options.requests, options.seed)
    print(
        json.dumps({"served": served, "simulated": simulated}, indent=2) if options.json else to_text(served, simulated)
    )
    return 0
