"""The stages of the whole model: vision, prefill, decode, time to first token, loading.

The decoder has 36 layers on a GPU and two on a CPU.
"""

import pytest
import torch

import keye_kernels as kk
from keye_kernels.tools.timing import peers, stages
from keye_kernels.tools.timing.models import build_model, make_config, saved_checkpoint
from keye_kernels.tools.timing.shapes import IMAGE_GRIDS, PROMPTS, SMALL_IMAGE_GRIDS, SMALL_PROMPTS

IMPLS = [peers.OFFICIAL, peers.COMPILED, peers.TRANSFORMERS, *peers.OURS]
VISION = {name: IMAGE_GRIDS[name] for name in ("1_image_1024", "16_images_mixed", "64_frames_448")}
# (batch size, cached tokens)
DECODE = {"batch_1_after_1024": (1, 1024), "batch_8_after_1024": (8, 1024)}
SMALL_DECODE = {"batch_1_after_16": (1, 16), "batch_2_after_16": (2, 16)}
# (grids, text tokens)
FIRST_TOKEN = {"1_image_1024_text_256": ([(1, 32, 32)], 256), "64_frames_448_text_64": ([(64, 16, 28)], 64)}
SMALL_FIRST_TOKEN = {"2_images_text_8": ([(1, 4, 4), (1, 2, 6)], 8)}


@pytest.fixture
def model(request, dtype, device, shape):
    small = shape in request.node.get_closest_marker("cases").kwargs["smoke"]
    layers = None if small or device.type == "cuda" else 2
    return build_model(make_config(small=small, decoder_layers=layers), getattr(torch, dtype), device)


@pytest.fixture
def measure_stage(measure, model, impl, device, is_timed):
    """A function that measures a case. Outputs are compared with "official (eager)", in `loading` with keye_kernels."""

    def run(case: stages.BenchmarkCase) -> None:
        reference = case.make.get(peers.OFFICIAL, case.make[stages.KEYE_KERNELS])

        def make():
            if impl in peers.OURS:
                call = case.make[stages.KEYE_KERNELS]()
                peers.check_ours(impl, device)

                def ours():
                    with kk.use_impl(impl):
                        return call()

                return ours
            if impl == peers.COMPILED:
                return peers.compiled(case.make[peers.OFFICIAL](), is_timed=is_timed)
            return case.make[impl]()

        with torch.inference_mode():
            expected = reference()()
        measure(make, expected, case.work, stages.TOLERANCES[model.dtype], case.floor)

    return run


@pytest.mark.benchmark(group="vision")
@pytest.mark.cases(impls=IMPLS, real=VISION, smoke=SMALL_IMAGE_GRIDS)
def test_vision(measure_stage, model, size):
    measure_stage(stages.vision(model, size))


@pytest.mark.benchmark(group="prefill")
@pytest.mark.cases(impls=IMPLS, real=PROMPTS, smoke=SMALL_PROMPTS)
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
@pytest.mark.cases(impls=[peers.TRANSFORMERS, "auto"], real={"real": None}, smoke={"small": None})
def test_loading(measure_stage, model, device):
    with saved_checkpoint(model) as path:
        measure_stage(stages.loading(path, device, model.dtype))
