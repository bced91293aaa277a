"""The error model of `verify`: bounds hold for every rounding and are not wider than needed."""

import pytest
import torch

from keye_kernels.triton import cases
from keye_kernels.triton.cases import round_once, subnormal_error, unit_roundoff

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@DTYPES
def test_the_bound_of_one_rounding_is_tight(dtype):
    exact = torch.cat((torch.linspace(1, 4, 30_001, dtype=torch.float64), -torch.logspace(-4, 3, 10_000, dtype=torch.float64)))
    error, allowed = (exact.to(dtype).double() - exact).abs(), round_once(exact, dtype)
    assert (error <= allowed).all() and (error / allowed).max() > 0.95
    assert unit_roundoff(dtype) == {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]


@DTYPES
def test_subnormal_numbers_are_rounded_to_half_of_their_distance(dtype):
    distance = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}[dtype]
    assert subnormal_error(dtype) == distance / 2
    exact = torch.arange(64, dtype=torch.float64) / 4 * distance
    if dtype == torch.float16:  # others may be flushed to zero
        assert (exact.to(dtype).double() - exact).abs().max() == subnormal_error(dtype)
    assert round_once(torch.zeros(1, dtype=torch.float64), dtype).item() == distance / 2


def test_constants():
    assert cases.SIGMAS == 6 and cases.FP32_ROUNDOFF == 2**-24
