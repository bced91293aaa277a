"""The learned position embedding, interpolated to the grid of each image and added to the patch features."""

import pytest
import torch

import keye_kernels as kk
from keye_kernels.geometry import VisionBatch
from keye_kernels.tools.timing import baseline, peers
from keye_kernels.tools.timing.measuring import RequiredWork, nbytes
from keye_kernels.tools.timing.shapes import IMAGE_GRIDS, SMALL_IMAGE_GRIDS, num_patches

REAL = {name: (grids, 1152, 27) for name, grids in IMAGE_GRIDS.items()}
SMOKE = {name: (grids, 48, 5) for name, grids in SMALL_IMAGE_GRIDS.items()}


@pytest.mark.benchmark(group="position_embedding_2d")
@pytest.mark.cases(impls=[peers.OFFICIAL, peers.COMPILED, *peers.OURS], real=REAL, smoke=SMOKE)
def test_position_embedding_2d(measure, impl, size, dtype, device, is_timed):
    grids, channels, side = size
    tokens, dtype = num_patches(grids), getattr(torch, dtype)
    torch.manual_seed(0)
    features = torch.randn(tokens, channels, device=device).to(dtype)
    table = torch.randn(side**2, channels, device=device).to(dtype)
    batch = VisionBatch.build(torch.tensor(grids), tokens, table_side=side, order="raster", device=device)

    def make():
        if impl == peers.OFFICIAL:
            return lambda: baseline.add_positions(features, table, grids)
        if impl == peers.COMPILED:
            options = {"is_timed": is_timed, "loop_iterations": len(grids)}
            return peers.compiled(baseline.add_positions, features, table, grids, **options)
        peers.check_ours(impl, device)
        return lambda: kk.ops.position_embedding_2d(features, table, batch, impl=impl)

    expected = kk.ops.position_embedding_2d(features.float(), table.float(), batch, impl="reference")
    corners = nbytes(batch.corner_index, batch.corner_weight)
    measure(make, expected, RequiredWork(tokens, 2 * nbytes(features) + nbytes(table) + corners))
