"""When decoding steps are recorded as a CUDA graph. tests/gpu checks what recorded steps compute."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import keye_kernels as kk
from keye_kernels.model import graphs, step_graph
from keye_kernels.model.step_graph import MIN_STEPS_TO_RECORD, _RecordedStep, recorded_step
from keye_kernels.ops.implementation import use_impl
from tests.helpers.tiny import CONFIG


class ModelOnGpu(nn.Module):
    """The attributes of a model on a GPU that the choice depends on."""

    def __init__(self, device="cuda"):
        super().__init__()
        self.device, self.head = torch.device(device), nn.Linear(2, 2)
        self.head.impl, self.cuda_graphs = "triton", True


def tiny_cache(slots=8, grows=True):
    return kk.KVCache(kk.KeyeConfig.from_dict(CONFIG), 1, slots, torch.float32, torch.device("cpu"), grows=grows)


@pytest.fixture(autouse=True)
def kernels_can_run(monkeypatch):
    monkeypatch.setattr("keye_kernels.ops.implementation._require_triton", lambda *_: None)


def is_recorded(model, steps=MIN_STEPS_TO_RECORD):
    return isinstance(recorded_step(model, tiny_cache(), lambda: None, steps), _RecordedStep)


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


def test_models_with_replaced_forwards_or_global_hooks_are_not_recorded():
    model = ModelOnGpu()
    model.head.forward = lambda x: x
    assert not is_recorded(model)
    del model.head.forward
    assert is_recorded(model)
    hook = nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
    try:
        assert not is_recorded(model)
    finally:
        hook.remove()


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
    """Notes what happens to it. `replay` runs `FakeGraph.recorded`; like a real graph, the capture has not run it."""

    recorded = None

    def __init__(self):
        self.generators, self.pool = [], None

    def register_generator_state(self, generator):
        assert self.pool is None, "before the capture begins"
        self.generators.append(generator)

    def capture_begin(self, pool, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.pool = pool

    def capture_end(self):
        pass

    def replay(self):
        type(self).recorded()


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
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("current"))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(graphs, "_capture_stream", lambda device: Stream("side"))
    return waited


@pytest.fixture
def calls(monkeypatch):
    """What was called to end a failed capture, in order, with its arguments."""
    called = []
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *rest, name=name: called.append((name, *rest)), raising=False)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **rest: zeros(*size, **rest))
    return called


def test_the_second_step_is_captured_and_replayed_from_then_on(waits, calls, monkeypatch):
    runs, generator = [], torch.Generator()
    monkeypatch.setattr(FakeGraph, "recorded", lambda: runs.append("replay"))
    step = recorded_step(ModelOnGpu(), tiny_cache(), lambda: runs.append("run"), MIN_STEPS_TO_RECORD, generator)
    step()
    assert runs == ["run"] and step.graph is None
    for _ in range(3):
        step()
    assert runs == ["run", "run", "replay", "replay", "replay"]  # the second one is the capture
    assert step.graph.generators == [generator] and step.graph.pool is not None
    assert waits == ["side for current", "current for side"] and calls == []


def test_a_replay_gives_the_result_of_the_capture(waits):
    result = torch.zeros(1)
    step = _RecordedStep(ModelOnGpu(), tiny_cache(), lambda: result, None)
    FakeGraph.recorded = lambda: result.add_(1)
    assert [int(step()) for _ in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("fails", ["capture_begin", "capture_end"])
def test_a_step_that_cannot_be_recorded_runs_without_a_graph(waits, calls, monkeypatch, caplog, fails):
    """Later steps and later conversations do not try again. torch is told that the capture has ended."""
    made, original = [], getattr(FakeGraph, fails)

    def fail(graph, **options):
        made.append(graph)
        if len(made) == 1:
            raise RuntimeError("operation not permitted")
        original(graph, **options)

    monkeypatch.setattr(FakeGraph, fails, fail)
    model, runs, generator = ModelOnGpu(), [], torch.Generator()
    step = recorded_step(model, tiny_cache(), lambda: runs.append(1), MIN_STEPS_TO_RECORD, generator)
    for _ in range(4):
        step()
    # Each step, and the capture that ended with a failure
    assert len(runs) == 4 + (fails == "capture_end") and step.graph is None
    assert waits == ["side for current"] and not is_recorded(model)
    assert "decoding runs without CUDA graphs" in caplog.text and "operation not permitted" in caplog.text
    failed, other = made
    if fails == "capture_end":
        assert calls == [("_cuda_endAllocateToPool", 0, failed.pool), ("_cuda_releasePool", 0, failed.pool)]
    # A second capture, in a pool of its own, resets the random generators
    assert failed.generators == other.generators == [generator] and other.pool is not failed.pool


def test_a_failure_of_the_recovery_does_not_hide_the_first_one(waits, calls, monkeypatch):
    def refuse(*rest):
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    def fail(graph, **options):
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", refuse)
    monkeypatch.setattr(FakeGraph, "capture_begin", fail)
    with pytest.raises(RuntimeError, match="operation not permitted"):
        graphs.capture(lambda: None, torch.device("cuda"))
    assert calls == []  # only a pool that was in use is released


def test_torch_before_2_8_has_another_name_for_the_end_of_a_capture(waits, calls, monkeypatch):
    def fail(graph):
        raise RuntimeError("operation not permitted")

    old = "_cuda_endAllocateCurrentStreamToPool"
    monkeypatch.setattr(torch._C, old, lambda *rest: calls.append((old, *rest)), raising=False)
    monkeypatch.setattr(FakeGraph, "capture_end", fail)
    with pytest.raises(RuntimeError, match="operation not permitted"):
        graphs.capture(lambda: None, torch.device("cuda:3"), pool="pool")
    assert calls == [(old, 3, "pool"), ("_cuda_releasePool", 3, "pool")]


def test_a_cache_that_grew_is_recorded_again(waits, monkeypatch):
    """A graph writes to the memory that it was captured with, and counts the tokens of each replay."""
    cache, slots, replayed = tiny_cache(), [], []

    def run():
        slots.append(cache.max_length)
        cache.advance(1)

    monkeypatch.setattr(FakeGraph, "recorded", lambda: replayed.append(slots[-1]))
    step = recorded_step(ModelOnGpu(), cache, run, MIN_STEPS_TO_RECORD)
    counts = []
    for needed in (1, 1, 1, 9, 1, 1):
        cache.reserve(1, needed)
        step()
        counts.append(cache.count)
    # Each size: a step, a capture with the replay of it, a replay
    assert slots == [8, 8, 512, 512] and replayed == [8, 8, 512, 512]
    assert counts == [1, 2, 3, 4, 5, 6]
