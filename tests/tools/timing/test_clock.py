"""Timing of calls: on a GPU (with stand-ins for CUDA events), on a CPU, the number of rounds, floors as CUDA graphs."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from keye_kernels.tools.timing import clock, floors
from keye_kernels.tools.timing.profiling import GpuActivity

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU without a GPU: events record the time of a clock that only launches advance; `log` has what happened."""
    state = SimpleNamespace(now=0.0, log=[])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = state.now
            state.log.append("record")

        def elapsed_time(self, other):
            return 1e3 * (other.time - self.time)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: state.log.append("synchronize"))

    def call():
        state.now += 0.25
        state.log.append("call")

    state.call = call
    return state


def test_a_gpu_is_idle_before_each_call_and_events_time_it(gpu):
    wall, cpu = clock.timed_call(gpu.call, GPU)
    assert wall == 0.25 and 0 <= cpu < 0.2
    assert gpu.log == ["synchronize", "record", "call", "record", "synchronize"]


def test_repeated_calls_are_launched_one_after_the_other(gpu):
    wall, _ = clock.timed_call(gpu.call, GPU, repeat=3)
    assert wall == 0.25 and gpu.log.count("synchronize") == 2 and gpu.log.count("call") == 3


def test_a_cpu_needs_no_events():
    calls = []
    wall, cpu = clock.timed_call(lambda: calls.append(1), CPU, repeat=4)
    assert len(calls) == 4 and wall == cpu > 0


@pytest.mark.parametrize(("seconds", "repeat", "rounds"), [(1e-4, 1, 30), (0.04, 1, 15), (0.004, 10, 15), (2.0, 1, 5)])
def test_slow_calls_get_fewer_rounds(monkeypatch, seconds, repeat, rounds):
    activity = GpuActivity(seconds / 2, 3, 4, [])
    monkeypatch.setattr(clock, "timed_call", lambda call, device, repeat: (seconds, seconds / 10))
    monkeypatch.setattr(clock, "profiled", lambda call, device: activity)
    monkeypatch.setattr(clock, "with_peak_memory", lambda call, device: (None, 77))
    found = clock.measure(lambda: None, GPU, repeat)
    assert found == clock.Measurement([seconds] * rounds, [seconds / 10] * rounds, activity, 77)
    assert found.median == seconds


def test_on_a_cpu_nothing_is_profiled():
    found = clock.measure(lambda: torch.ones(1000), CPU)
    assert found.activity is None and found.peak_memory_bytes >= 4000


def test_a_recorded_call_replays_its_graph(monkeypatch):
    log = []

    @contextmanager
    def noted(name):
        log.append(name)
        yield

    stream = SimpleNamespace(wait_stream=lambda other: log.append("wait"))
    graph = SimpleNamespace(replay=lambda: log.append("replay"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda one: noted("side stream"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda one: noted("capture"))
    replay = clock.recorded(lambda: log.append("call") or "output")
    assert log == ["wait", "side stream", "call", "wait", "capture", "call"]
    assert replay() == "output" and log[6:] == ["replay"]


@pytest.mark.parametrize("flops", [10**9, 27 * 4 * 16 * 72 * 1024**2, 27 * 4 * 16 * 72 * 28672**2])
def test_attention_at_the_peak_rate_has_the_flops_of_attention(flops):
    call = floors.at_peak(flops, torch.empty(1, device="meta", dtype=torch.bfloat16))
    with FlopCounterMode(display=False) as counter:
        call()
    assert flops <= counter.get_total_flops() < 1.04 * flops
