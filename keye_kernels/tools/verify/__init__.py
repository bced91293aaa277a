"""`keye-kernels verify`: checks the kernels on this machine.

Every operator runs in each dtype on random inputs and is compared with float64 on the CPU. It runs several times on one input to
find races, and between guard regions to find out-of-bounds reads and writes (`checks`). Then the small model answers questions
with the kernels and with the reference (`answers`). The cases are in `keye_kernels/triton`, next to each kernel.
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
from itertools import product
from typing import Any, NamedTuple

import torch

from keye_kernels import __version__
from keye_kernels.triton.cases import VerifyCase
from keye_kernels.triton.registry import verify_cases

from .answers import check_answers
from .checks import CheckResult, cast, check, run_case, run_reference

RUNS = 10  # of one input, to find races
INTERPRETER_RUNS = 2
SEEDS = 2
WIDTHS = (22, 44, 5, 9, 9, 5)


class Setup(NamedTuple):
    """What is verified on this machine, and notes about it for the report."""

    device: torch.device
    impl: str
    real_sizes: bool
    dtypes: tuple[torch.dtype, ...]
    runs: int
    notes: list[str]


def choose_setup(device: str | torch.device | None = None) -> Setup:
    """The kernels on a GPU, the kernels in Triton's interpreter on a CPU, or the reference where Triton is not installed.

    Sets TRITON_INTERPRET where the interpreter is needed. Raises ValueError for a device that does not exist, or if Triton was
    already imported in the other mode.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    except RuntimeError as error:
        raise ValueError(f"device must be a torch device such as 'cpu' or 'cuda:0', got {device!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be a CPU, CUDA or ROCm device, got {str(device)!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must exist, got {str(device)!r}: torch finds no CUDA or ROCm GPU")
    every = (torch.float32, torch.float16, torch.bfloat16)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if importlib.util.find_spec("triton") is None:
        note = "Triton is not installed: only the reference implementation is verified"
        on_gpu = device.type == "cuda"
        return Setup(device, "reference", on_gpu, every, RUNS if on_gpu else INTERPRETER_RUNS, [note])
    if device.type == "cuda":
        if interpreted:
            raise ValueError("TRITON_INTERPRET must not be 1 to verify the kernels on a GPU: unset it, or use --device cpu")
        return Setup(device, "triton", True, every, RUNS, [])
    if not interpreted:
        if "triton" in sys.modules:
            what = "device 'cpu' needs Triton's interpreter, but this process has imported Triton to compile"
            raise ValueError(f"{what}: set TRITON_INTERPRET=1 before Python starts")
        os.environ["TRITON_INTERPRET"] = "1"
    notes = [
        "no GPU: the kernels run in Triton's interpreter, at reduced sizes",
        "no bf16: the interpreter computes bf16 matmuls incorrectly",
        "the interpreter runs programs one after another, so races cannot occur: two runs per input instead of ten",
    ]
    return Setup(device, "triton", False, every[:2], INTERPRETER_RUNS, notes)


def verify(
    setup: Setup, *, seeds: int = SEEDS, chosen: Sequence[VerifyCase] | None = None, answers: bool = True,
    report: Callable[[CheckResult], object] = lambda result: None,
) -> list[CheckResult]:  # fmt: skip
    """Checks cases (None: those of all kernels) in every dtype and implementation, and with `answers` the small model's.

    `report` is called with each result as soon as it exists. Raises ValueError for fewer than one seed (inputs per case).
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    results, chosen = [], verify_cases(setup.real_sizes, run_reference) if chosen is None else chosen
    if setup.device.type == "cuda" and setup.impl == "triton":
        # A kernel that does not compile fails in its own case
        with contextlib.suppress(Exception):
            compile_ahead(chosen, setup)
    for case in chosen:
        for dtype, impl in product(setup.dtypes, implementations(setup, case.operator)):
            results.append(check(case, dtype, setup.device, impl, seeds, setup.runs))
            report(results[-1])
    if answers:
        for result in check_answers(setup.device, setup.impl):
            results.append(result)
            report(result)
    return results


def implementations(setup: Setup, operator: str) -> list[str]:
    """The implementation of the setup, and on a GPU also "torch" for a projector, which "auto" runs there."""
    if setup.impl == "triton" and setup.device.type == "cuda" and operator == "patch_merge_projection":
        return ["triton", "torch"]
    return [setup.impl]


def compile_ahead(chosen: Sequence[VerifyCase], setup: Setup) -> tuple[int, int]:
    """Compiles the kernels of the cases in parallel. Returns how many were compiled and how many were in Triton's cache."""
    from keye_kernels.triton.launch import compile_steps

    def step(case: VerifyCase, dtype: torch.dtype) -> None:
        run_case(case, cast(case.draw(torch.Generator().manual_seed(0)), dtype, setup.device), setup.impl)

    return compile_steps([partial(step, case, dtype) for case in chosen for dtype in setup.dtypes], lambda: None)


def describe(setup: Setup) -> dict[str, Any]:
    """Device and versions of the results."""
    name, capability = "cpu", None
    if setup.device.type == "cuda":
        name = torch.cuda.get_device_name(setup.device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(setup.device)))
    triton = import_module("triton").__version__ if setup.impl == "triton" else None
    versions = {"keye_kernels": __version__, "torch": torch.__version__, "triton": triton}
    return {"device": name, "capability": capability, "implementation": setup.impl, **versions, "notes": setup.notes}


def run(options: argparse.Namespace) -> int:
    """The command. Prints the table or a JSON object; returns 1 if a check fails."""
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
    print("\n" + _row("operator", "case", "dtype", "error", "allowed", "equal", "result"))
    results = verify(setup, seeds=options.seeds, report=lambda result: print(_line(result), flush=True))
    failed = sum(not result.passed for result in results)
    seconds = time.perf_counter() - start
    print(f"\n{len(results) - failed} of {len(results)} checks pass, {failed} FAIL, in {seconds:.0f} s.")
    return 1 if failed else 0


def _line(result: CheckResult) -> str:
    verdict = "pass" if result.passed else "FAIL"
    guards = "" if result.guards == "ok" else f": {result.guards}"
    same = f"{result.runs - result.runs_that_differ}/{result.runs}"
    numbers = f"{result.error:.2e}", f"{result.allowed:.2e}"
    return _row(result.operator, result.case, result.dtype, *numbers, same, verdict + guards)


def _row(*cells: str) -> str:
    return "  ".join((*(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=False)), cells[-1]))


def _json(result: CheckResult) -> dict[str, Any]:
    values = asdict(result) | {"passed": result.passed}
    # JSON has no infinity
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in values.items()}
