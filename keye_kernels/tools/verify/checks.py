"""How `verify` checks one case: against float64, for races, and for accesses out of bounds."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from keye_kernels import ops
from keye_kernels.triton.cases import Arguments, Truth, VerifyCase

GUARD_ROWS, GUARD_COLUMNS = 8, 8  # around the rows of a tensor, and after each row that may have a stride; 16-byte aligned
STRIDED = ("q", "k", "v", "features")  # the arguments whose rows may have a stride
HOST_ARGUMENTS = ("grid_thw",)
FLOAT32_ARGUMENTS = ("inv_freq",)  # float32 for every dtype under test
SENTINEL = 2**31 - 1  # fills integer guards, as NaN fills floating-point ones
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass
class CheckResult:
    """One line of the table: the worst element of all seeds, and the findings of the repetitions and the guards."""

    operator: str
    case: str
    dtype: str
    error: float
    allowed: float
    runs: int
    runs_that_differ: int
    guards: str  # "ok", what is wrong, or what was raised
    seconds: float

    @property
    def passed(self) -> bool:
        # False for a NaN error
        return self.error <= self.allowed and not self.runs_that_differ and self.guards == "ok"


def run_reference(operator: str, **arguments: Any) -> tuple[Tensor, ...]:
    """The outputs of a public operator with impl="reference"."""
    outputs = getattr(ops, operator)(**arguments, impl="reference")
    return outputs if isinstance(outputs, tuple) else (outputs,)


def run_case(case: VerifyCase, arguments: Arguments, impl: str) -> tuple[Tensor, ...]:
    """The outputs, then the arguments that were written. These get their old values back, for the next run."""
    before = [arguments[name].clone() for name in case.written]
    outputs = getattr(ops, case.operator)(**arguments, impl=impl)
    written = [arguments[name].clone() for name in case.written]
    for name, old in zip(case.written, before, strict=True):
        arguments[name].copy_(old)
    return (*(outputs if isinstance(outputs, tuple) else (outputs,)), *written)


def cast(arguments: Arguments, dtype: torch.dtype, device: torch.device) -> Arguments:
    """The arguments in a dtype and on a device, except for those that are fixed."""

    def move(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or name in HOST_ARGUMENTS:
            return value
        return value.to(device, dtype if value.is_floating_point() and name not in FLOAT32_ARGUMENTS else None)

    return {name: move(name, value) for name, value in arguments.items()}


def check(case: VerifyCase, dtype: torch.dtype, device: torch.device, impl: str, seeds: int, runs: int) -> CheckResult:
    """Runs one case in one dtype: `seeds` inputs against float64, and the first input `runs` times and between guards.

    An exception of the operator is a finding, too, and ends the case.
    """
    start = time.perf_counter()
    try:
        worst, differ, guards = _check(case, dtype, device, impl, seeds, runs)
    except Exception as error:
        message = (str(error).strip().splitlines() or [""])[0]
        worst, differ, guards = (torch.inf, 0.0), 0, f"raised {type(error).__name__}: {message}"
    seconds = round(time.perf_counter() - start, 2)
    label = case.label + (", torch matmuls" if impl == "torch" else "")
    return CheckResult(case.operator, label, DTYPE_NAMES[dtype], *worst, runs, differ, guards, seconds)


def _check(
    case: VerifyCase, dtype: torch.dtype, device: torch.device, impl: str, seeds: int, runs: int
) -> tuple[tuple[float, float], int, str]:
    worst, differ, guards = (0.0, 0.0), 0, "ok"
    for seed in range(seeds):
        drawn = cast(case.draw(torch.Generator().manual_seed(seed)), dtype, torch.device("cpu"))
        truth = case.truth(cast(drawn, torch.float64, torch.device("cpu")), dtype)
        arguments = cast(drawn, dtype, device)
        outputs = run_case(case, arguments, impl)
        element = worst_element(outputs, truth)
        worst = max(worst, element, key=_share)
        if seed == 0:
            differ = sum(not _same_bits(outputs, run_case(case, arguments, impl)) for _ in range(runs - 1))
            guards = check_guards(case, arguments, truth if element[0] <= element[1] else None, impl)
    return worst, differ, guards


def worst_element(outputs: Sequence[Tensor], truth: Truth) -> tuple[float, float]:
    """(error, allowed) of the element with the largest error relative to what is allowed; NaN counts as infinite."""
    found = (0.0, 0.0)
    for output, (exact, allowed) in zip(outputs, truth, strict=True):
        error = (output.cpu().double() - exact).abs().nan_to_num(nan=torch.inf).flatten()
        if error.numel():
            # 0 / 0 is NaN, which argmax would prefer
            at = int((error / allowed.flatten()).masked_fill(error == 0, 0).argmax())
            found = max(found, (float(error[at]), float(allowed.flatten()[at])), key=_share)
    return found


def check_guards(case: VerifyCase, arguments: Arguments, truth: Truth | None, impl: str) -> str:
    """Places inputs and outputs between NaN guards: reads of a guard make the result wrong, writes change the guard.

    Without `truth` (the result is already wrong without guards) the result is not compared.
    """
    placed = {
        name: _place(value, GUARD_COLUMNS if name in STRIDED else 0)
        for name, value in arguments.items()
        if isinstance(value, Tensor) and name not in HOST_ARGUMENTS
    }
    before = {name: _bits(buffer).clone() for name, (buffer, _) in placed.items()}
    with guarded_allocations() as allocated:
        outputs = run_case(case, {**arguments, **{name: view for name, (_, view) in placed.items()}}, impl)
    changed = [name for name, (buffer, _) in placed.items() if not torch.equal(_bits(buffer), before[name])]
    if changed:
        return f"wrote into or next to {', '.join(changed)}"
    if not all(guard.isnan().all() for guard in allocated):
        return "wrote next to an output"
    error, allowed = worst_element(outputs, truth) if truth else (0.0, 0.0)
    if not error <= allowed:
        return f"reads out of bounds, or leaves elements unwritten (error {error:.2e}, allowed {allowed:.2e})"
    return "ok"


@contextmanager
def guarded_allocations() -> Iterator[list[Tensor]]:
    """Floating-point tensors allocated by Python calls are filled with NaN and placed between guards; yields the guards."""
    guards: list[Tensor] = []

    def guarded(allocate: Any) -> Any:
        def allocate_between_guards(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            if not tensor.is_floating_point() or not tensor.numel() or not tensor.is_contiguous():
                return tensor
            buffer, view = _place(tensor.fill_(torch.nan), 0)
            guards.extend((buffer[:GUARD_ROWS], buffer[-GUARD_ROWS:]))
            return view

        return allocate_between_guards

    with ExitStack() as patches:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patches.enter_context(patch.object(owner, name, guarded(getattr(owner, name))))
        yield guards


def _place(tensor: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """A buffer of NaN (or SENTINEL) and a copy of the tensor inside it, with `columns` guard elements after each row."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    filler = torch.nan if tensor.is_floating_point() else SENTINEL
    buffer = tensor.new_full((len(rows) + 2 * GUARD_ROWS, rows.shape[1] + columns), filler)
    view = buffer[GUARD_ROWS : GUARD_ROWS + len(rows), : rows.shape[1]]
    view.copy_(rows)
    return buffer, view.unflatten(0, tensor.shape[:-1]) if tensor.ndim > 1 else view[0]


def _same_bits(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(_bits(a), _bits(b)) for a, b in zip(one, other, strict=True))


def _bits(x: Tensor) -> Tensor:
    """The bits as integers, so that NaN equals itself."""
    return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def _share(element: tuple[float, float]) -> float:
    error, allowed = element
    return error / allowed if allowed else error and torch.inf
