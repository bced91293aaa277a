"""The linear layers of a decoding step, with what follows them in the same call: the residual add, or silu(gate) * up."""

import pytest
import torch
import torch.nn.functional as F

import keye_kernels as kk
from keye_kernels.tools.timing import peers
from keye_kernels.tools.timing.measuring import RequiredWork, nbytes
from keye_kernels.triton.linear_few_rows_cases import LAYERS, Layer

REAL = {f"{name}_{rows}": (rows, layer) for name, layer in LAYERS.items() for rows in (1, 8, 16)}
SMOKE = {
    "plain_3": (3, Layer(24, 64)),
    "silu_mul_3": (3, Layer(24, 64, silu_mul=True)),
    "residual_8": (8, Layer(24, 64, residual=True)),
}


@pytest.mark.benchmark(group="linear_few_rows")
@pytest.mark.cases(impls=[peers.OFFICIAL, peers.COMPILED, *peers.OURS], real=REAL, smoke=SMOKE)
def test_linear_few_rows(measure, impl, size, dtype, device, is_timed):
    """The official code calls torch's matmul, and an operator for each step after it."""
    rows, (columns, width, silu_mul, has_residual) = size
    torch.manual_seed(0)
    options = {"dtype": getattr(torch, dtype), "device": device}
    x, residual = torch.randn(rows, width, **options), torch.randn(rows, columns, **options) if has_residual else None
    weight = torch.randn(columns * (1 + silu_mul), width, **options).mul_(width**-0.5)

    def official(x, weight, residual):
        out = F.linear(x, weight)
        if silu_mul:
            gate, up = out.chunk(2, dim=1)
            out = F.silu(gate) * up
        return out if residual is None else residual + out

    def make():
        if impl == peers.OFFICIAL:
            return lambda: official(x, weight, residual)
        if impl == peers.COMPILED:
            return peers.compiled(official, x, weight, residual, is_timed=is_timed)
        peers.check_ours(impl, device)
        return lambda: kk.ops.linear_few_rows(x, weight, residual=residual, silu_mul=silu_mul, impl=impl)

    wide = (tensor if tensor is None else tensor.float() for tensor in (x, weight, residual))
    required = nbytes(x, weight) + rows * columns * x.element_size() * (1 + has_residual)
    measure(make, official(*wide), RequiredWork(rows, required, 2 * rows * weight.numel()))
