"""From JPEG files in memory to patches, and to the output of the projector: one image, and 16 images."""

import pytest
import torch

from keye_kernels.tools.timing import images, peers, stages
from keye_kernels.tools.timing.models import build_model, make_config
from keye_kernels.tools.timing.shapes import PHOTOS, SMALL_PHOTOS


@pytest.mark.benchmark(group="preprocessing")
@pytest.mark.cases(impls=[peers.ONE_BY_ONE, peers.ONE_THREAD, stages.KEYE_KERNELS], real=PHOTOS, smoke=SMALL_PHOTOS)
def test_preprocessing(measure, impl, size):
    case = images.preprocessing(size)
    measure(case.make[impl], case.make[peers.ONE_BY_ONE]()(), case.work, stages.TOLERANCES[torch.float32])


@pytest.mark.benchmark(group="images")
@pytest.mark.cases(impls=[peers.TRANSFORMERS, peers.ONE_BY_ONE, stages.KEYE_KERNELS], real=PHOTOS, smoke=SMALL_PHOTOS)
def test_images(measure, impl, size, dtype, device):
    small = size in SMALL_PHOTOS.values()
    case = images.images(build_model(make_config(small=small, decoder_layers=0), getattr(torch, dtype), device), size)
    with torch.inference_mode():
        expected = case.make[peers.ONE_BY_ONE]()()
    measure(case.make[impl], expected, case.work, stages.TOLERANCES[getattr(torch, dtype)])
