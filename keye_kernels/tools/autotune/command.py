"""The command line of the tuner."""

import argparse
from pathlib import Path

from .shapes import KERNELS, SETS, load_shapes

DTYPES = ("bf16", "fp16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `run` reads."""
    parser.add_argument("--kernel", metavar="NAME[,NAME]", default=",".join(KERNELS), help=f"of {', '.join(KERNELS)}")
    parser.add_argument("--shapes", default="keye-8b", metavar="SET|FILE", help=f"{', '.join(SETS)}, or a JSON file")
    parser.add_argument("--dtype", default="bf16", help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--save-dir", metavar="DIR", help="folder of the tables; default: where launches look first")
    parser.add_argument(
        "--resume", action="store_true", help="skip shapes that an earlier run of the same versions timed"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="compile and rank without a GPU; saves only to --save-dir"
    )
    parser.add_argument("--target", metavar="NAME[,NAME]", help="for --dry-run, for instance sm_90")


def run(options: argparse.Namespace) -> None:
    """Tunes, or ranks. Raises ValueError, naming what is known, for an unknown kernel, target, dtype or set of shapes."""
    kernels = names(options.kernel, KERNELS, "kernel")
    names(options.dtype, DTYPES, "dtype", several=False)
    shapes = load_shapes(options.shapes, kernels)
    if not shapes:
        raise ValueError(f"--shapes {options.shapes} has nothing for {', '.join(kernels)}")
    if options.save_dir and Path(options.save_dir).exists() and not Path(options.save_dir).is_dir():
        raise ValueError(f"--save-dir {options.save_dir} must be a folder, and is a file")
    if options.dry_run:
        _dry_run(options, shapes)
        return
    if options.target:
        raise ValueError("--target goes with --dry-run; tables are timed on the GPU that is here")
    import torch

    from .sweep import on_this_gpu, sweep

    if not torch.cuda.is_available():
        raise ValueError("no GPU is here; --dry-run --target sm_90 ranks tiles without one")
    print(sweep(on_this_gpu(), shapes, options.dtype, options.save_dir, options.resume).to_text())


def _dry_run(options: argparse.Namespace, shapes: list) -> None:
    if options.resume:
        raise ValueError(
            "--resume goes on with timings; --dry-run takes none, and finds what it compiled in Triton's cache"
        )
    from keye_kernels.tools.compile import CHIPS

    if not options.target:
        raise ValueError(f"--dry-run needs --target, of {', '.join(CHIPS)}")
    targets = names(options.target, tuple(CHIPS), "target")
    from .dryrun import dry_run, report

    ranked = dry_run(list(targets), shapes, options.dtype, options.save_dir)
    for result in ranked:
        for note in dict.fromkeys(result.notes):
            print(note)
    print(report(ranked))


def names(argument: str, known: tuple[str, ...], what: str, several: bool = True) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(argument.split(","))) if several else (argument,)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown {what} {', '.join(map(repr, unknown))}; known: {', '.join(known)}")
    return names
