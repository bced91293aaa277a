"""`VerifyCase`: one use of a public operator that `verify` checks, and the error model that the cases share.

Each kernel with an operator has a module KERNEL_cases.py with a function `verify_cases`. These modules do not import Triton.

The exact result is computed in float64 from the inputs that the operator gets (already rounded to its dtype). The allowed error
of each output element is added up from the places where a kernel rounds. u is the unit roundoff of the dtype (eps / 2):

- Rounding the output costs u·|out|. Float32 arithmetic before it costs FP32_ROUNDOFF times the sum of the absolute values of
  the terms, times a small constant.
- The rounding errors of many terms are independent, so their variances add up: a sum of w·x with each x rounded by u has a
  standard deviation below u·sqrt(Σ w²x²). SIGMAS of it are allowed (Higham and Mary 2019, "A new approach to probabilistic
  rounding error analysis"). A worst case over a row of 4608 terms would accept almost any mistake.
- A float32 sum of n terms is off by about FP32_ROUNDOFF·sqrt(n) of itself, in any order of summation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]
# For each output of an operator: the exact value and the allowed error of each element, both float64
Truth = list[tuple[Tensor, Tensor]]
# (operator name, **arguments) -> outputs of the public operator with impl="reference"
RunReference = Callable[..., tuple[Tensor, ...]]

SIGMAS = 6  # one element in 10^9 exceeds six standard deviations by chance
FP32_ROUNDOFF = torch.finfo(torch.float32).eps / 2


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def subnormal_error(dtype: torch.dtype) -> float:
    """Half the distance of two subnormal numbers: the error of rounding near zero."""
    return torch.finfo(dtype).tiny * unit_roundoff(dtype)


def round_once(exact: Tensor, dtype: torch.dtype) -> Tensor:
    # Slightly above u: the small error of the value before it is rounded may carry it over a power of two
    return (1 + 2**-6) * unit_roundoff(dtype) * exact.abs() + subnormal_error(dtype)


@dataclass(frozen=True)
class VerifyCase:
    """One use of a public operator, with inputs and the error that rounding can explain.

    `draw` makes the operator's arguments by name, floating-point ones in float32 on the CPU. `truth` takes them in float64,
    together with the dtype under test. `written` are arguments that the operator modifies: their new values are further outputs.
    """

    operator: str
    label: str
    draw: Callable[[torch.Generator], Arguments]
    truth: Callable[[Arguments, torch.dtype], Truth]
    written: tuple[str, ...] = ()
