"""vLLM's manager of encoder CUDA graphs on a CPU, with the plugin's models: a replay calls the forward on the captured buffers.

Needs the environment of `make_environment`.
"""

import contextlib
import importlib.util
import os

import pytest
import torch

from tests.helpers.random_checkpoint import write_random_checkpoint

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM: build an environment with tests/integrations/vllm/make_environment FOLDER", allow_module_level=True)

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
GRIDS = [(1, 8, 8), (1, 4, 6), (1, 16, 24), (1, 2, 2), (1, 40, 40), (1, 4, 6), (1, 12, 4)]
# float32 sums in a different order
TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}


class Recorded:
    """A CUDA graph whose replay runs the forward again."""

    replays = 0

    def replay(self):
        type(self).replays += 1
        self.run()


@pytest.fixture(scope="module", params=["Keye", "KeyeVL1_5"])
def loaded(request, tmp_path_factory):
    """vLLM's configuration, and the model as vLLM's worker loads it."""
    os.environ.update(OFFLINE)
    from vllm.config import set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    folder = tmp_path_factory.mktemp("checkpoint") / request.param
    write_random_checkpoint(folder, model_type=request.param)
    compilation = {"cudagraph_mm_encoder": True, "encoder_cudagraph_token_budgets": [16, 64, 128]}
    config = EngineArgs(
        str(folder), dtype="float32", max_model_len=2048, skip_mm_profiling=True, compilation_config=compilation
    ).create_engine_config()
    with set_current_vllm_config(config), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "empty_cache", lambda: None)  # as vLLM's CPU worker does
        address = f"file://{tmp_path_factory.mktemp('store')}/store"
        init_distributed_environment(1, 0, address, 0, backend="gloo")
        initialize_model_parallel(1, 1)
        yield config, get_model(vllm_config=config)
        cleanup_dist_env_and_memory()


@pytest.fixture
def manager(loaded, monkeypatch):
    from vllm.v1.worker import encoder_cudagraph

    config, model = loaded
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: contextlib.nullcontext())
    monkeypatch.setattr(encoder_cudagraph, "current_stream", lambda: None)
    made = encoder_cudagraph.EncoderCudaGraphManager(config, torch.device("cpu"), torch.float32, model)
    made.capture(graph_pool=object())
    for captured in made.budget_graphs["default"].values():

        def run(captured=captured):
            captured.output_buffer.copy_(model.encoder_cudagraph_forward({**captured.input_buffers}))

        captured.graph.run = run
    return made


def inputs(grids, seed=0):
    generator = torch.Generator().manual_seed(seed)
    patches = sum(t * h * w for t, h, w in grids)
    pixels = torch.randn(patches, 3, 14, 14, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor(grids)}


@torch.inference_mode()
def test_the_manager_gives_the_embeddings_of_eager_encoding(loaded, manager):
    _, model = loaded
    assert sorted(manager.budget_graphs["default"]) == [16, 64, 128] and manager.supports_modality("image")
    for seed in range(2):
        mm_kwargs = inputs(GRIDS, seed)
        replays = Recorded.replays
        found, expected = manager.execute(mm_kwargs), model.embed_multimodal(**mm_kwargs)
        assert Recorded.replays > replays
        assert [len(x) for x in found] == [t * h * w // 4 for t, h, w in GRIDS]
        for ours, eager in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, eager, **TOLERANCE)
    assert (manager.graph_hits, manager.graph_misses) == (12, 2)  # an image of 400 tokens fits no graph


@torch.inference_mode()
def test_a_replay_does_not_depend_on_earlier_ones(manager):
    first = manager.execute(inputs(GRIDS[:2]))
    manager.execute(inputs(GRIDS, seed=1))
    again = manager.execute(inputs(GRIDS[:2]))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_vllm_finds_the_protocol_and_its_layers(loaded):
    from vllm.model_executor.layers.utils import default_unquantized_gemm
    from vllm.model_executor.models.interfaces import supports_encoder_cudagraph

    from keye_kernels.integrations.vllm import models

    _, model = loaded
    assert supports_encoder_cudagraph(model) and isinstance(model, models.KeyeKernelsMixin)
    mlp = model.visual.vision_model.encoder.layers[0].mlp
    assert not models._is_matmul_and_tanh_gelu(mlp)  # vLLM's CPU build has another matmul
    mlp.fc1.quant_method._gemm_impl = default_unquantized_gemm
    assert models._is_matmul_and_tanh_gelu(mlp)
