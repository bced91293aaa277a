"""The projector: LayerNorm, 2x2 merge and two matmuls. Preview normalizes before the merge, 1.5 after it."""

import pytest
import torch

import keye_kernels as kk
from keye_kernels.geometry import VisionBatch
from keye_kernels.tools.timing import baseline, peers
from keye_kernels.tools.timing.measuring import RequiredWork, nbytes
from keye_kernels.tools.timing.shapes import IMAGE_GRIDS, SMALL_IMAGE_GRIDS, num_patches

# Grids, input channels, output channels, whether the norm comes after the merge
REAL = {name: (grids, 1152, 4096, False) for name, grids in IMAGE_GRIDS.items()}
REAL["16_images_mixed_v1_5"] = (IMAGE_GRIDS["16_images_mixed"], 1152, 4096, True)
SMOKE = {name: (grids, 48, 64, False) for name, grids in SMALL_IMAGE_GRIDS.items()}
SMOKE["4_images_mixed_v1_5"] = (SMALL_IMAGE_GRIDS["4_images_mixed"], 48, 64, True)


@pytest.mark.benchmark(group="patch_merge_projection")
@pytest.mark.cases(impls=[peers.OFFICIAL, peers.COMPILED, *peers.OURS], real=REAL, smoke=SMOKE)
def test_patch_merge_projection(measure, impl, size, dtype, device, is_timed):
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
        if impl == peers.OFFICIAL:
            return lambda: baseline.project(features, grids, *weights)
        if impl == peers.COMPILED:
            options = {"is_timed": is_timed, "loop_iterations": len(grids)}
            return peers.compiled(baseline.project, features, grids, *weights, **options)
        peers.check_ours(impl, device)
        return lambda: project(features, weights, impl)

    expected = project(features.float(), [w.float() for w in weights], "reference")
    rows = tokens // 4
    out = rows * width * features.element_size()
    measure(make, expected, RequiredWork(tokens, nbytes(features, *weights) + out, 2 * rows * merged * (merged + width)))
