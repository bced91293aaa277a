"""Varlen attention: of the vision tower (16 heads of 72) and of the decoder (32 query and 8 key heads of 128, causal)."""

import pytest
import torch

from keye_kernels.tools.timing import peers
from keye_kernels.tools.timing.operators import ATTENTION, SMALL_ATTENTION, attention


@pytest.mark.benchmark(group="varlen_attention")
@pytest.mark.cases(
    impls=[
        peers.OFFICIAL,
        peers.COMPILED,
        peers.SDPA,
        peers.TORCH_FLASH,
        peers.CUDNN,
        peers.FLASH_ATTN,
        peers.FLASH_ATTN_4,
        *peers.OURS,
    ],
    real=ATTENTION,
    smoke=SMALL_ATTENTION,
)
def test_varlen_attention(measure, impl, size, dtype, device, is_timed):
    case = attention(size, getattr(torch, dtype), device)

    def make():
        if impl == peers.COMPILED:
            return peers.compiled(case.make[peers.OFFICIAL](), is_timed=is_timed, loop_iterations=len(size.lengths))
        return case.make[impl]()

    measure(make, case.expected(), case.work)
