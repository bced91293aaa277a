"""`keye-kernels verify`: whether the kernels are right on this machine.

Every operator runs in each dtype on drawn inputs and is compared with float64 on the CPU (`cases`), run again on the same
input to see races, and run amid guards to see reads and writes out of range (`checks`); then the small model answers
questions with the kernels and with the reference (`answers`).
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch

from keye_kernels import __version__

from .answers import check_answers
from .cases import Case, cases, cast
from .checks import Result, check

RUNS = 10  # of the same input, to see races
INTERPRETER_RUNS = 2
SEEDS = 2
WIDTHS = (22, 44, 5, 9, 9, 5)


class Setup(NamedTuple):
    """What will be verified here, and the sentences that say so."""

    device: torch.device
    impl: str
    real_sizes: bool
    dtypes: tuple[torch.dtype, ...]
    runs: int
    notes: list[str]


def choose_setup(device: str | torch.device | None = None) -> Setup:
    """The kernels on a GPU, the kernels in Triton's interpreter on a CPU, or without Triton the reference.

    Sets TRITON_INTERPRET where the interpreter is needed. Raises ValueError for a device that is not there, or where
    Triton's mode does not suit the device and was chosen already.
    """
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device must be a torch device such as 'cpu' or 'cuda:0', got {device!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be a CPU, CUDA or ROCm device, got {str(device)!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be one that is here, got {str(device)!r}: torch finds no CUDA or ROCm GPU")
    every = (torch.float32, torch.float16, torch.bfloat16)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if importlib.util.find_spec("triton") is None:
        note = "Triton is not installed: only the reference implementation is verified"
        on_gpu = device.type == "cuda"
        return Setup(device, "reference", on_gpu, every, RUNS if on_gpu else INTERPRETER_RUNS, [note])
    if device.type == "cuda":
        if interpreted:
            raise ValueError(
                "TRITON_INTERPRET must not be 1 to verify the kernels on a GPU: unset it, or use --device cpu"
            )
        return Setup(device, "triton", True, every, RUNS, [])
    if not interpreted:
        if "triton" in sys.modules:
            raise ValueError(
                "device 'cpu' needs Triton's interpreter, but this process has imported Triton to compile: set "
                "TRITON_INTERPRET=1 before Python starts"
            )
        os.environ["TRITON_INTERPRET"] = "1"
    notes = [
        "no GPU is used: the kernels run in Triton's interpreter, at reduced sizes",
        "bf16 is left out: the interpreter multiplies it wrongly",
        "the interpreter runs programs one after another, so that races cannot show: two runs of an input, not ten",
    ]
    return Setup(device, "triton", False, every[:2], INTERPRETER_RUNS, notes)


def verify(
    setup: Setup,
    *,
    seeds: int = SEEDS,
    chosen: Sequence[Case] | None = None,
    answers: bool = True,
    report: Callable[[Result], object] = lambda result: None,
) -> list[Result]:
    """Checks `chosen` cases (all of this setup's sizes if None) in every dtype, then the small model's answers.

    `report` receives each result as soon as it is there. Raises ValueError for a number of seeds below 1.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    results, chosen = [], cases(setup.real_sizes) if chosen is None else chosen
    if setup.device.type == "cuda" and setup.impl == "triton":
        # A kernel that cannot be compiled is a finding of its own case
        with contextlib.suppress(Exception):
            compile_ahead(chosen, setup)
    for case in chosen:
        for dtype in setup.dtypes:
            results.append(check(case, dtype, setup.device, setup.impl, seeds, setup.runs))
            report(results[-1])
    if answers:
        for result in check_answers(setup.device, setup.impl):
            results.append(result)
            report(result)
    return results


def compile_ahead(chosen: Sequence[Case], setup: Setup) -> tuple[int, int]:
    """Compiles what the cases will launch, several kernels at a time; how many, and how many the cache had."""
    from keye_kernels.triton.launch import compile_steps

    def step(case: Case, dtype: torch.dtype) -> None:
        case.run(cast(case.draw(torch.Generator().manual_seed(0)), dtype, setup.device), setup.impl)

    return compile_steps([partial(step, case, dtype) for case in chosen for dtype in setup.dtypes], lambda: None)


def describe(setup: Setup) -> dict[str, Any]:
    """Where the results were obtained, for the report and for those who compare reports."""
    is_gpu = setup.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(setup.device) if is_gpu else "cpu",
        "capability": ".".join(map(str, torch.cuda.get_device_capability(setup.device))) if is_gpu else None,
        "implementation": setup.impl,
        "keye_kernels": __version__,
        "torch": torch.__version__,
        "triton": import_module("triton").__version__ if setup.impl == "triton" else None,
        "notes": setup.notes,
    }


def run(options: argparse.Namespace) -> int:
    """The command: prints the table or a JSON object; 1 if something fails."""
    if options.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {options.seeds}")
    setup = choose_setup(options.device)
    about, start = describe(setup), time.perf_counter()
    if options.json:
        results = verify(setup, seeds=options.seeds)
        passed, seconds = all(result.passed for result in results), round(time.perf_counter() - start, 1)
        lines = [_json(result) for result in results]
        print(json.dumps({**about, "passed": passed, "seconds": seconds, "results": lines}, indent=2))
        return 0 if passed else 1
    print(f"keye_kernels {about['keye_kernels']}, the {setup.impl} implementation on {about['device']}", end="")
    print(f" (torch {about['torch']}, Triton {about['triton'] or 'not installed'})")
    for note in setup.notes:
        print(f"Note: {note}.")
    print("\n" + _row("operator", "case", "dtype", "error", "allowed", "same", "result"))
    results = verify(setup, seeds=options.seeds, report=lambda result: print(_line(result), flush=True))
    failed = sum(not result.passed for result in results)
    seconds = time.perf_counter() - start
    print(f"\n{len(results) - failed} of {len(results)} checks pass, {failed} FAIL, in {seconds:.0f} s.")
    return 1 if failed else 0


def _line(result: Result) -> str:
    verdict = "pass" if result.passed else "FAIL"
    guards = "" if result.guards == "ok" else f": {result.guards}"
    same = f"{result.runs - result.runs_that_differ}/{result.runs}"
    numbers = f"{result.error:.2e}", f"{result.allowed:.2e}"
    return _row(result.operator, result.case, result.dtype, *numbers, same, verdict + guards)


def _row(*cells: str) -> str:
    return "  ".join((*(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=False)), cells[-1]))


def _json(result: Result) -> dict[str, Any]:
    values = asdict(result) | {"passed": result.passed}
    # JSON has no infinity
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in values.items()}
