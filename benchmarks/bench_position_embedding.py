"""Learned 2D positions, resized to each picture and added."""

import pytest
import torch

import keye_kernels as kk
from keye_kernels.geometry import VisionBatch

from . import baseline, peers
from .measuring import Work, nbytes
from .shapes import PICTURES, SMALL_PICTURES, num_patches

REAL = {name: (grids, 1152, 27) for name, grids in PICTURES.items()}
SMOKE = {name: (grids, 48, 5) for name, grids in SMALL_PICTURES.items()}


@pytest.mark.benchmark(group="position_embedding_2d")
@pytest.mark.cases(impls=["official", "compiled", *peers.OURS], real=REAL, smoke=SMOKE)
def test_position_embedding_2d(measure, impl, size, dtype, device, request):
    grids, channels, side = size
    tokens, dtype = num_patches(grids), getattr(torch, dtype)
    torch.manual_seed(0)
    features = torch.randn(tokens, channels, device=device).to(dtype)
    table = torch.randn(side**2, channels, device=device).to(dtype)
    batch = VisionBatch.build(torch.tensor(grids), tokens, table_side=side, order="raster", device=device)

    def make():
        if impl == "official":
            return lambda: baseline.add_positions(features, table, grids)
        if impl == "compiled":
            if len(grids) > 16:
                raise peers.Unavailable(
                    f"compiled: the loop over {len(grids)} pictures would be unrolled into one graph"
                )
            smoke = request.config.getoption("benchmark_disable")
            return peers.compiled(baseline.add_positions, features, table, grids, smoke=smoke)
        peers.check_ours(impl, device)
        return lambda: kk.ops.position_embedding_2d(features, table, batch, impl=impl)

    expected = kk.ops.position_embedding_2d(features.float(), table.float(), batch, impl="reference")
    corners = nbytes(batch.corner_index, batch.corner_weight)
    measure(make, expected, Work(tokens, 2 * nbytes(features) + nbytes(table) + corners))
