"""LayerNorm, 2x2 merge and the two products of the projector; Preview's (norm before the merge) and 1.5's (after it)."""

import pytest
import torch

import keye_kernels as kk
from keye_kernels.geometry import VisionBatch

from . import baseline, peers
from .measuring import Work, nbytes
from .shapes import PICTURES, SMALL_PICTURES, num_patches

# Grids, channels, output width, norm after the merge
REAL = {name: (grids, 1152, 4096, False) for name, grids in PICTURES.items()}
REAL["16_images_mixed_v1_5"] = (PICTURES["16_images_mixed"], 1152, 4096, True)
SMOKE = {name: (grids, 48, 64, False) for name, grids in SMALL_PICTURES.items()}
SMOKE["4_images_mixed_v1_5"] = (SMALL_PICTURES["4_images_mixed"], 48, 64, True)


@pytest.mark.benchmark(group="patch_merge_projection")
@pytest.mark.cases(impls=["official", "compiled", *peers.OURS], real=REAL, smoke=SMOKE)
def test_patch_merge_projection(measure, impl, size, dtype, device, request):
    grids, channels, width, norm_after = size
    tokens, dtype, merged = num_patches(grids), getattr(torch, dtype), 4 * channels
    torch.manual_seed(0)
    features = torch.randn(tokens, channels, device=device).to(dtype)
    norm = merged if norm_after else channels
    shapes = [(norm,), (norm,), (merged, merged), (merged,), (width, merged), (width,)]
    weights = [(torch.randn(shape, device=device) * shape[-1] ** -0.5).to(dtype) for shape in shapes]
    batch = VisionBatch.build(torch.tensor(grids), tokens, table_side=27, order="raster", device=device)

    def project(features, weights, impl):
        return kk.ops.patch_merge_projection(features, batch, *weights, impl=impl)

    def make():
        if impl == "official":
            return lambda: baseline.project(features, grids, *weights)
        if impl == "compiled":
            if len(grids) > 16:
                raise peers.Unavailable(
                    f"compiled: the loop over {len(grids)} pictures would be unrolled into one graph"
                )
            smoke = request.config.getoption("benchmark_disable")
            return peers.compiled(baseline.project, features, grids, *weights, smoke=smoke)
        peers.check_ours(impl, device)
        return lambda: project(features, weights, impl)

    expected = project(features.float(), [w.float() for w in weights], "reference")
    rows = tokens // 4
    out = rows * width * features.element_size()
    measure(make, expected, Work(tokens, nbytes(features, *weights) + out, 2 * rows * merged * (merged + width)))
