"""Where CUDA graphs of images are not used, or no longer: changed models, hooks, adapters, gradients, modes.

The CPU plays the GPU (`tests/helpers/fake_graphs.py`).
"""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import keye_kernels as kk
from keye_kernels.model import graphs, image_graphs
from tests.helpers.image_graphs import GRIDS, ROUNDING, eager, encode, inputs, play_gpu, replaced
from tests.helpers.tiny import tiny_model


@pytest.fixture
def gpu(monkeypatch):
    return play_gpu(monkeypatch)


def new_memory(model):
    model.mlp_AR.linear_2.bias.data = torch.randn_like(model.mlp_AR.linear_2.bias)


def moved(model):
    model.visual.to(torch.float64)
    model.mlp_AR.to(torch.float64)


def loaded(model):
    state = {name: torch.randn_like(x) for name, x in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def other_module(model):
    model.visual.layers[0].layer_norm1 = nn.LayerNorm(48, eps=0.5)


def other_eps(model):
    model.visual.post_layernorm.eps = 1.0


def other_norm(model):
    model.visual.pixel_norm = model.visual.pixel_norm._replace(image_mean=(0.1, 0.2, 0.3))


def fewer_layers(model):
    model.visual.layers = model.visual.layers[:1]


CHANGES = [replaced, new_memory, moved, loaded, other_module, other_eps, other_norm, fewer_layers]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("batches_before", [1, 2, 3])
def test_a_changed_model_drops_its_graphs(gpu, change, batches_before):
    model = tiny_model()
    dtype = torch.uint8 if change is other_norm else torch.float32
    before = encode(model, *GRIDS, times=batches_before, dtype=dtype)
    num_captured = len(gpu.captured)
    change(model)
    # As many batches again: without a graph, with a new one and with its replay
    for _ in range(3):
        found = encode(model, *GRIDS, dtype=dtype)
        torch.testing.assert_close(found, eager(model, *inputs(*GRIDS, dtype=dtype)), **ROUNDING)
    assert not torch.allclose(found.float(), before)
    assert len(gpu.captured) == num_captured + 1


class Adapter(nn.Module):
    """Its forward depends on an attribute that is no parameter, like those of LoRA."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.scaling = layer, {"default": 1.0}

    def forward(self, x):
        return self.layer(x) * self.scaling["default"]


@pytest.mark.parametrize("batches_before", [0, 2])
def test_modules_of_other_packages_run_without_a_graph(gpu, batches_before):
    model = tiny_model()
    for _ in range(batches_before):
        encode(model, *GRIDS)
    adapter = Adapter(model.visual.post_layernorm)
    model.visual.post_layernorm = adapter
    for scale in (1.0, 2.0, 3.0, 0.5):
        for graph in gpu.captured:  # a fake graph runs the modules, a real one does not
            graph.run = lambda graph=graph: graph.result
        adapter.scaling["default"] = scale
        torch.testing.assert_close(encode(model, *GRIDS), eager(model, *inputs(*GRIDS)), **ROUNDING)
    assert model.visual.graphs.memory().captured == 0


@pytest.mark.parametrize("batches_before", [0, 1, 2])
def test_a_replaced_forward_of_a_module_is_called(gpu, batches_before):
    model, calls = tiny_model(), []
    for _ in range(batches_before):
        encode(model, *GRIDS)
    attention = model.visual.layers[0].self_attn
    forward = attention.forward
    attention.forward = lambda *arguments: calls.append(1) or forward(*arguments)
    for number in (1, 2, 3):
        for graph in gpu.captured:
            graph.run = lambda graph=graph: graph.result
        encode(model, *GRIDS)
        assert len(calls) == number
    assert model.visual.graphs.memory().captured == 0


def test_a_replaced_forward_of_a_class_drops_the_graphs(gpu, monkeypatch):
    model = tiny_model()
    encode(model, *GRIDS, times=2)
    gpu.captured[0].run = lambda: gpu.captured[0].result
    monkeypatch.setattr(type(model.visual.layers[0].self_attn), "forward", lambda module, x, *_: x * 0)
    torch.testing.assert_close(encode(model, *GRIDS), eager(model, *inputs(*GRIDS)), **ROUNDING)


def test_values_that_change_in_place_need_no_new_graph(gpu):
    model = tiny_model()
    encode(model, *GRIDS, times=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    torch.testing.assert_close(encode(model, *GRIDS), eager(model, *inputs(*GRIDS)), **ROUNDING)
    assert len(gpu.captured) == 1 and gpu.captured[0].replays == 2


def test_moving_the_tower_frees_the_memory_of_its_graphs_at_once(gpu):
    model = tiny_model()
    encode(model, *GRIDS, times=2)
    assert model.visual.graphs.memory().captured == 1
    model.visual.to("cpu")
    assert model.visual.graphs.memory() == (0, 0)


@pytest.mark.parametrize("when", [0, 1, 2, 3])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_run_once_per_batch(gpu, register, when):
    model, calls = tiny_model(), []
    for _ in range(when):
        encode(model, *GRIDS)
    getattr(model.visual.layers[1].mlp.fc2, register)(lambda module, *_: calls.append(module))
    if when > 1:  # a fake graph runs the modules, a real one does not
        gpu.captured[0].run = lambda: gpu.captured[0].result
    for number in (1, 2, 3):
        encode(model, *GRIDS)
        assert len(calls) == number
    assert model.visual.graphs.memory().captured == 0


def test_global_hooks_are_not_skipped(gpu):
    model, calls = tiny_model(), []
    encode(model, *GRIDS, times=2)
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(module))
    try:
        gpu.captured[0].run = lambda: gpu.captured[0].result
        encode(model, *GRIDS)
    finally:
        handle.remove()
    assert model.visual.layers[0] in calls


class Logging(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


def test_what_needs_more_than_the_result_runs_without_a_graph(gpu, monkeypatch):
    model = tiny_model()
    pixels, grid_thw = inputs(*GRIDS)
    contexts = [
        torch.enable_grad(),
        torch.autocast("cpu", dtype=torch.bfloat16),
        Logging(),
        kk.use_impl("reference"),
    ]
    # In place of the check of every module
    monkeypatch.setattr(graphs, "runs_triton", lambda tower, device: image_graphs.default_impl() != "reference")
    for context in contexts:
        with torch.no_grad(), context:
            features = [model.get_image_features(pixels, grid_thw) for _ in range(3)]
        assert gpu.captured == [] and features[0].requires_grad == (context is contexts[0])
    model.visual.impl = "reference"
    monkeypatch.setattr(graphs, "runs_triton", lambda module, device: getattr(module, "impl", "auto") != "reference")
    encode(model, *GRIDS, times=3)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    model.visual.impl = "auto"
    encode(model, *GRIDS, times=3)
    assert gpu.captured == []
