"""The whole model by stages: pictures to embeddings, prompt to first logits, one decoding step, both, and loading.

`official` is `baseline.py`, `transformers` the transformers model of this package with SDPA. On a GPU the decoder has its 36
layers, on a CPU two.
"""

import pytest
import torch

import keye_kernels as kk

from . import peers, stages
from .shapes import PICTURES, SMALL_PICTURES, SMALL_TEXT, TEXT

IMPLS = ["official", "compiled", "transformers", *peers.OURS]
VISION = {name: PICTURES[name] for name in ("1_image_1024", "16_images_mixed", "64_frames_448")}
PREFILL = {name: TEXT[name] for name in ("1k", "8k")}
DECODE = {"batch_1_after_1024": (1, 1024), "batch_8_after_1024": (8, 1024)}
SMALL_DECODE = {"batch_1_after_16": (1, 16), "batch_2_after_16": (2, 16)}
FIRST_TOKEN = {"1_image_1024_text_256": ([(1, 32, 32)], 256), "64_frames_448_text_64": ([(64, 16, 28)], 64)}
SMALL_FIRST_TOKEN = {"2_images_text_8": ([(1, 4, 4), (1, 2, 6)], 8)}
# In half precision two ways of rounding drift apart over the layers
HALF_TOLERANCE = 0.05


@pytest.fixture
def model(request, dtype, device, shape):
    small = shape in request.node.get_closest_marker("cases").kwargs["smoke"]
    layers = None if small or device.type == "cuda" else 2
    return stages.build(stages.config(small=small, decoder_layers=layers), getattr(torch, dtype), device)


@pytest.fixture
def measure_stage(measure, model, impl, device, request):
    """Takes a case apart: the reference is the official form, or the lean model's in `loading`."""

    def run(case: stages.Case) -> None:
        reference = case.make.get("official", case.make["keye_kernels"])

        def make():
            if impl in peers.OURS:
                call = case.make["keye_kernels"]()
                peers.check_ours(impl, device)

                def ours():
                    with kk.use_impl(impl):
                        return call()

                return ours
            if impl == "compiled":
                return peers.compiled(case.make["official"](), smoke=request.config.getoption("benchmark_disable"))
            return case.make[impl]()

        with torch.inference_mode():
            expected = reference()()
        half = model.dtype != torch.float32
        measure(make, expected, case.work, tolerance=HALF_TOLERANCE if half else stages.TOLERANCE)

    return run


@pytest.mark.benchmark(group="vision")
@pytest.mark.cases(impls=IMPLS, real=VISION, smoke=SMALL_PICTURES)
def test_vision(measure_stage, model, size):
    measure_stage(stages.vision(model, size))


@pytest.mark.benchmark(group="prefill")
@pytest.mark.cases(impls=IMPLS, real=PREFILL, smoke=SMALL_TEXT)
def test_prefill(measure_stage, model, size):
    measure_stage(stages.prefill(model, *size))


@pytest.mark.benchmark(group="decode")
@pytest.mark.cases(impls=IMPLS, real=DECODE, smoke=SMALL_DECODE)
def test_decode(measure_stage, model, size):
    measure_stage(stages.decode(model, *size))


@pytest.mark.benchmark(group="time_to_first_token")
@pytest.mark.cases(impls=IMPLS, real=FIRST_TOKEN, smoke=SMALL_FIRST_TOKEN)
def test_time_to_first_token(measure_stage, model, size):
    measure_stage(stages.first_token(model, *size))


@pytest.mark.benchmark(group="loading")
@pytest.mark.cases(impls=["transformers", "auto"], real={"real": None}, smoke={"small": None})
def test_loading(measure_stage, model, device):
    with stages.checkpoint(model) as path:
        measure_stage(stages.loading(path, device, model.dtype))
