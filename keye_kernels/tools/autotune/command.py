"""The command line of autotune."""

import argparse
from pathlib import Path

from keye_kernels.tools.time_box import TimeBox
from keye_kernels.triton.registry import kernel_names

from .workloads import WORKLOADS, load_shapes

DTYPES = ("bf16", "fp16")
DEFAULT_MINUTES = 3.75


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options that `run` reads."""
    kernels = kernel_names()
    parser.add_argument("--kernel", metavar="NAME[,NAME]", default=",".join(kernels), help=f"of {', '.join(kernels)}")
    parser.add_argument("--shapes", default="keye-8b", metavar="NAME|FILE", help=f"{', '.join(WORKLOADS)}, or a JSON file")
    parser.add_argument("--dtype", default="bf16", help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--save-dir", metavar="DIR", help="folder of the table; default: where launches look first")
    parser.add_argument("--resume", action="store_true", help="keep the times of an earlier run with the same versions")
    minutes_help = f"leave out the shapes that do not fit into this time (default: {DEFAULT_MINUTES})"
    parser.add_argument("--minutes", type=float, metavar="N", help=minutes_help)
    parser.add_argument("--dry-run", action="store_true", help="list and compile what would be tried on --target; times nothing")
    parser.add_argument("--target", metavar="NAME[,NAME]", help="for --dry-run, for instance sm_90")


def run(options: argparse.Namespace) -> int:
    """Tunes, or lists the candidates. Returns 1 if the table cannot be written or no config of a shape works."""
    minutes = DEFAULT_MINUTES if options.minutes is None else options.minutes
    if not minutes > 0:
        raise ValueError(f"--minutes must be a positive number, got {minutes:g}")
    box = TimeBox(60 * minutes)
    kernels = names(options.kernel, kernel_names(), "kernel")
    names(options.dtype, DTYPES, "dtype", several=False)
    shapes = load_shapes(options.shapes, kernels)
    if not shapes:
        raise ValueError(f"--shapes {options.shapes} has no shapes for {', '.join(kernels)}")
    if options.save_dir and Path(options.save_dir).exists() and not Path(options.save_dir).is_dir():
        raise ValueError(f"--save-dir must be a folder, got the file {options.save_dir}")
    if options.dry_run:
        return _dry_run(options, shapes)
    if options.target:
        raise ValueError("--target needs --dry-run; without it, the GPU of this machine is tuned")
    import torch

    from .sweep import on_this_gpu, sweep

    if not torch.cuda.is_available():
        raise ValueError("autotune needs a GPU, and torch finds none; --dry-run --target sm_90 compiles without one")
    result = sweep(on_this_gpu(), shapes, options.dtype, options.save_dir, options.resume, box)
    print(result.to_text())
    have_times = (record.timings or record.shape in result.left_out for record in result.records)
    return int(result.unwritable is not None or not all(have_times))


def _dry_run(options: argparse.Namespace, shapes: list) -> int:
    for name in ("resume", "save_dir", "minutes"):
        if getattr(options, name):
            raise ValueError(f"--{name.replace('_', '-')} needs a run that times: --dry-run saves nothing")
    from keye_kernels.triton.device import MULTIPROCESSORS

    if not options.target:
        raise ValueError(f"--dry-run needs --target, of {', '.join(MULTIPROCESSORS)}")
    targets = names(options.target, tuple(MULTIPROCESSORS), "target")
    from .dryrun import dry_run

    lines, works = dry_run(list(targets), shapes, options.dtype)
    print("\n".join(["compiled ahead of time, nothing was timed", *lines]))
    return int(not works)


def names(argument: str, known: tuple[str, ...], what: str, several: bool = True) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(argument.split(","))) if several else (argument,)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown {what} {', '.join(map(repr, unknown))}; known: {', '.join(known)}")
    return names
