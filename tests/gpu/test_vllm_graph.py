"""CUDA graphs of the vision encoder in the vLLM plugin, with stubs in place of vLLM's classes.

Run with: TRITON_INTERPRET=0 pytest tests/gpu -n 0
"""

import os

import pytest
import torch

from tests.integrations.vllm.encoder_replay import BATCHES, EDITIONS, build, capture, copy_to_buffers, inputs
from tests.integrations.vllm.stubs import stubbed_models

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs a GPU and compiled kernels (TRITON_INTERPRET=0)",
)
CUDA = torch.device("cuda")


@pytest.mark.parametrize("options", [{}, {"quant_config": "fp8"}], ids=["plain", "vLLM's projector"])
@pytest.mark.parametrize("model_type", EDITIONS)
@torch.inference_mode()
def test_a_graph_serves_images_of_other_sizes(model_type, options, monkeypatch):
    with stubbed_models(monkeypatch) as models:
        model = build(models, model_type, CUDA, **options)
        buffers = capture(model, CUDA)
        model.encoder_cudagraph_forward(dict(buffers))  # compiles the kernels
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model.encoder_cudagraph_forward(dict(buffers))
        for grids in [*BATCHES, BATCHES[0]]:
            mm_kwargs = inputs(grids, device=CUDA)
            copy_to_buffers(model, buffers, mm_kwargs)
            graph.replay()
            assert torch.equal(out, model.encoder_cudagraph_forward(dict(buffers)))
            expected = model.encoder_eager_forward(mm_kwargs)
            # Matmuls may choose another kernel for the number of rows
            torch.testing.assert_close(out[: len(expected)], expected, atol=1e-4, rtol=1e-4)
