"""The verify cases of linear_few_rows, and the linear layers of the decoder, which have few rows in a decoding step."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import FP32_ROUNDOFF, SIGMAS, Arguments, RunReference, Truth, VerifyCase, round_once

OPERATOR = "linear_few_rows"
MAX_ROWS = 16
MAX_SILU_SLOPE = 1.1


class Layer(NamedTuple):
    """`columns` of the output; with `silu_mul` the weight has twice as many rows."""

    columns: int
    width: int
    silu_mul: bool = False
    residual: bool = False


LAYERS = {
    "qkv": Layer(6144, 4096),
    "o": Layer(4096, 4096),
    "gate_up": Layer(12_288, 4096, silu_mul=True),
    "down": Layer(4096, 12_288, residual=True),
    "head": Layer(151_936, 4096),
}


def verify_cases(real_sizes: bool, reference: RunReference) -> list[VerifyCase]:
    """Multiply-adds and `tl.dot`, with rows and columns that end within a block."""
    width, wide, columns = (4096, 12_288, 1001) if real_sizes else (200, 328, 27)
    return [
        _verify_case(f"bias and residual, {rows} x {wide}", rows, wide, columns, False, True, reference) for rows in (1, 3, 13)
    ] + [_verify_case(f"silu * up, {rows} x {width}", rows, width, columns, True, False, reference) for rows in (1, 7)]


def _verify_case(
    label: str, rows: int, width: int, columns: int, silu_mul: bool, extras: bool, reference: RunReference
) -> VerifyCase:
    def draw(generator: torch.Generator) -> Arguments:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        weight_rows = 2 * columns if silu_mul else columns
        return {
            "x": normal(rows, width),
            "weight": 2 * normal(weight_rows, width) * width**-0.5,
            "bias": normal(weight_rows) if extras else None,
            "residual": 2 * normal(rows, columns) if extras else None,
            "silu_mul": silu_mul,
        }

    def truth(arguments: Arguments, dtype: torch.dtype) -> Truth:
        """A float32 sum, whose error passes through the gate, is rounded once."""
        (out,) = reference(OPERATOR, **arguments)
        x, weight = arguments["x"], arguments["weight"]
        variance = FP32_ROUNDOFF**2 * width * F.linear(x.square(), weight.square())
        if silu_mul:
            gate, up = F.linear(x, weight).chunk(2, dim=1)
            of_gate, of_up = variance.chunk(2, dim=1)
            variance = (MAX_SILU_SLOPE * up).square() * of_gate + F.silu(gate).square() * of_up
            variance += (FP32_ROUNDOFF * (8 + 2 * gate.abs()) * out).square()
        else:
            variance += (2 * FP32_ROUNDOFF) ** 2 * (out.square() + arguments["residual"].square())
        return [(out, round_once(out, dtype) + SIGMAS * variance.sqrt())]

    return VerifyCase(OPERATOR, label, draw, truth)
