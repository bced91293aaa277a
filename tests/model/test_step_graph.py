"""When decoding steps are recorded as a CUDA graph. tests/gpu checks what recorded steps compute."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from keye_kernels.model import graphs, step_graph
from keye_kernels.model.step_graph import MIN_STEPS_TO_RECORD, _RecordedStep, decoding_step
from keye_kernels.ops.implementation import use_impl


class ModelOnGpu(nn.Module):
    """The attributes of a model on a GPU that the choice depends on."""

    def __init__(self, device="cuda"):
        super().__init__()
        self.device, self.head = torch.device(device), nn.Linear(2, 2)
        self.head.impl, self.cuda_graphs = "triton", True


@pytest.fixture(autouse=True)
def kernels_can_run(monkeypatch):
    monkeypatch.setattr("keye_kernels.ops.implementation._require_triton", lambda *_: None)


def is_recorded(model, steps=MIN_STEPS_TO_RECORD):
    return isinstance(decoding_step(model, None, steps), _RecordedStep)


def test_steps_are_recorded_from_min_steps_on():
    assert is_recorded(ModelOnGpu()) and not is_recorded(ModelOnGpu(), MIN_STEPS_TO_RECORD - 1)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_models_with_hooks_are_not_recorded(register):
    model = ModelOnGpu()
    hook = getattr(model.head, register)(lambda *args: None)
    assert not is_recorded(model)
    hook.remove()
    assert is_recorded(model)


def test_the_reference_is_not_recorded():
    model = ModelOnGpu()
    model.head.impl = "reference"
    assert not is_recorded(model)
    model.head.impl = "flash_attn"  # used for prompts only: decoding steps run the kernels
    assert is_recorded(model)
    with use_impl("reference"):
        assert not is_recorded(model)


def test_a_model_is_not_recorded_again_after_a_failure():
    model = ModelOnGpu()
    step_graph._failed.add(model)
    assert not is_recorded(model) and is_recorded(ModelOnGpu())


def test_cuda_graphs_can_be_turned_off():
    model = ModelOnGpu()
    model.cuda_graphs = False
    assert not is_recorded(model)


def test_cpu_compiled_models_and_autocast_are_not_recorded():
    assert not is_recorded(ModelOnGpu("cpu"))
    for compiled in (lambda model: model, lambda model: model.head):
        model = ModelOnGpu()
        compiled(model).compile(backend="eager")
        assert not is_recorded(model)
    # Without a GPU, torch.autocast("cuda") warns and stays disabled
    torch.set_autocast_enabled("cuda", True)
    try:
        assert not is_recorded(ModelOnGpu())
    finally:
        torch.set_autocast_enabled("cuda", False)


class FakeGraph:
    """Records the call of the model, which `replay` repeats with the tensors of the recorded call."""

    def capture_begin(self, **options):
        assert options == {"capture_error_mode": "thread_local"}

    def capture_end(self):
        pass


@pytest.fixture
def waits(monkeypatch):
    """What streams wait for, in order, with `FakeGraph` in place of CUDA graphs."""
    waited = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            waited.append(f"{self.name} for {other.name}")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("current"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(graphs, "_capture_stream", lambda device: Stream("side"))
    return waited


def test_a_recorded_step_gets_the_token_of_each_call(waits):
    class Double(nn.Module):
        def forward(self, token, cache):
            assert cache == "cache"
            FakeGraph.replay = lambda graph: logits.copy_(2 * token)
            logits = 2 * token
            return SimpleNamespace(logits=logits)

    step, tokens = _RecordedStep(Double(), "cache"), [torch.tensor([[token]]) for token in (3, 5, 4, 9)]
    assert [int(step(token)) for token in tokens] == [6, 10, 8, 18] and isinstance(step.graph, FakeGraph)
    assert [int(token) for token in tokens] == [3, 5, 4, 9]  # the graph has a copy
    assert waits == ["side for current", "current for side"]


def test_a_step_that_cannot_be_recorded_runs_without_a_graph(waits, monkeypatch, caplog):
    """Later steps and later conversations do not try again."""

    def fail(graph, **options):
        raise RuntimeError("operation not permitted")

    class Double(ModelOnGpu):
        def forward(self, token, cache):
            return SimpleNamespace(logits=2 * token)

    monkeypatch.setattr(FakeGraph, "capture_begin", fail)
    model = Double()
    step = decoding_step(model, None, MIN_STEPS_TO_RECORD)
    assert [int(step(torch.tensor([[token]]))) for token in (3, 5, 4)] == [6, 10, 8]
    assert waits == ["side for current"] and not is_recorded(model)
    assert "decoding runs without CUDA graphs" in caplog.text and "operation not permitted" in caplog.text
