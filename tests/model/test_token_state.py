"""The tokens of a generation: choosing, ending, and copies to the CPU that arrive one step late, as those of a GPU do."""

from contextlib import nullcontext

import pytest
import torch

from keye_kernels import host_copy
from keye_kernels.host_copy import HostCopies
from keye_kernels.model import generation
from keye_kernels.model.generation import Sampler
from keye_kernels.model.prompt_lookup import LookupState
from keye_kernels.model.token_state import TokenState
from tests.helpers.tiny import tiny_model


class LateCopies(HostCopies):
    """Those of a GPU: a copy is finished when the next one has been started."""

    def __init__(self, device):
        super().__init__(device)
        self.delay, self.started = 1, 0

    def start(self, tensor):
        copy = tensor.clone()
        self.started += 1
        index = self.started

        def finish():
            assert self.started in (index, index + 1)
            return copy

        return finish


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setattr(generation, "HostCopies", LateCopies)


@pytest.fixture
def forwards(model, monkeypatch):
    """One entry for each call of the model."""
    calls, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda *rest, **options: calls.append(1) or forward(*rest, **options))
    return calls


IDS = torch.randint(0, 100, (3, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 4, "temperature": 2.0}], ids=["greedy", "sampled"])
def test_late_copies_change_no_result(model, forwards, monkeypatch, options):
    """At most one step runs after the last end token."""
    free = model.generate(IDS, max_new_tokens=12, eos_token_id=(), **options)
    ends = [int(free[0, 7]), int(free[1, 8]), int(free[2, 6])]
    for end_tokens, max_new_tokens in (((), 12), ((), 1), (ends, 12), (ends, 4), (ends[:1], 12)):
        call = {"max_new_tokens": max_new_tokens, "eos_token_id": end_tokens, "pad_token_id": 119, **options}
        with monkeypatch.context() as patch:
            forwards.clear()
            expected = model.generate(IDS, **call)
            steps = len(forwards)
            patch.setattr(generation, "HostCopies", LateCopies)
            forwards.clear()
            assert torch.equal(model.generate(IDS, **call), expected)
        new = expected.shape[1] - 5
        assert steps == new and len(forwards) == min(new + 1, max_new_tokens)


def test_a_streamer_gets_a_token_while_the_next_step_runs(model, forwards, late):
    received = []

    class Streamer:
        def put(self, value):
            received.append((len(forwards), value.clone()))

        def end(self):
            received.append("end")

    tokens = model.generate(IDS, max_new_tokens=5, eos_token_id=(), streamer=Streamer())
    (_, prompt), *new, end = received
    assert torch.equal(prompt, IDS) and end == "end"
    assert torch.equal(torch.stack([chosen for _, chosen in new], dim=1), tokens[:, 5:])
    assert [steps for steps, _ in new] == [2, 3, 4, 5, 5]


def test_without_a_gpu_a_streamer_gets_a_token_before_the_next_step(model, forwards):
    steps = []

    class Streamer:
        def put(self, value):
            steps.append(len(forwards))

        def end(self):
            pass

    model.generate(IDS, max_new_tokens=4, eos_token_id=(), streamer=Streamer())
    assert steps == [0, 1, 2, 3, 4]


def test_logits_of_a_step_after_the_end_are_not_checked(model, monkeypatch, late):
    free = model.generate(IDS[:1], max_new_tokens=3, eos_token_id=())
    forward, calls = model.forward, []

    def forward_with_nan(*rest, **options):
        output = forward(*rest, **options)
        calls.append(1)
        return output._replace(logits=output.logits * torch.nan) if len(calls) == 4 else output

    monkeypatch.setattr(model, "forward", forward_with_nan)
    assert torch.equal(model.generate(IDS[:1], max_new_tokens=9, eos_token_id=int(free[0, -1])), free) and len(calls) == 4
    calls.clear()
    with pytest.raises(RuntimeError, match="the logits are NaN or infinite"):
        model.generate(IDS[:1], max_new_tokens=4, eos_token_id=())


def test_a_state_can_be_used_again():
    def run(state, prompt):
        state.start(prompt)
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            state.append(torch.randn(2, 1, 8, generator=generator))
        return state.tokens[:, : int(state.length)].clone(), state.finished.clone(), state.sums.clone()

    def new_state():
        return TokenState(2, 9, Sampler(), [1, 5], 7, torch.device("cpu"))

    state = new_state()
    run(state, torch.full((2, 5), 3))
    prompt = torch.tensor([[1, 2], [3, 4]])
    for found, expected in zip(run(state, prompt), run(new_state(), prompt), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("num_drafts", [0, 3])
def test_a_step_writes_to_the_same_tensors_each_time(model, num_drafts):
    """As a CUDA graph of it does."""
    arguments = 40, Sampler(), [1, 5], 7, torch.device("cpu")
    state = LookupState(num_drafts, *arguments) if num_drafts else TokenState(1, *arguments)
    cache = model.new_cache(1, state.max_length)

    def tensors():
        held = [*vars(state).values(), *vars(cache).values(), *cache.keys, *cache.values]
        return [x.data_ptr() for x in held if isinstance(x, torch.Tensor)]

    state.start(IDS[:1])
    with torch.no_grad():
        state.append(model(IDS[:1], cache=cache, logits_to_keep=1).logits)
        state.step(model, cache)
        before, used = tensors(), int(state.length)
        for _ in range(4):
            state.step(model, cache)
    assert tensors() == before and int(state.length) >= used + 4


def test_sampled_tokens_are_those_of_multinomial():
    logits = torch.randn(50, 200, generator=torch.Generator().manual_seed(0)) * 3
    expected = logits.softmax(-1).multinomial(1, generator=torch.Generator().manual_seed(9))[:, 0]
    assert torch.equal(Sampler(True, seed=9)(logits), expected)
    torch.manual_seed(3)
    expected = logits.softmax(-1).multinomial(1)[:, 0]
    torch.manual_seed(3)
    assert torch.equal(Sampler(True)(logits), expected)


def test_copies_from_a_gpu_use_pinned_memory_and_wait_for_their_event(monkeypatch):
    """The values are those at the time of the event, whatever is written later."""
    gpu, events = torch.device("cuda:1"), []

    class Event:
        def record(self, stream):
            events.append(f"record on {stream}")

        def synchronize(self):
            events.append("wait")

    monkeypatch.setattr(host_copy, "_uses_pinned_memory", lambda device: device == gpu)
    monkeypatch.setattr(
        host_copy, "_empty_pinned", lambda shape, dtype: events.append("pinned") or torch.empty(shape, dtype=dtype)
    )
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    copies, values = HostCopies(gpu), torch.tensor([3, 4])
    assert copies.delay == 1 and HostCopies(torch.device("cpu")).delay == 0
    finish = copies.start(values)
    values.zero_()
    assert events == ["pinned", "record on stream of cuda:1"]
    assert finish().tolist() == [3, 4] and events[-1] == "wait"
