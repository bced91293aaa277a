"""CUDA graphs on a machine without a GPU: a replay runs the captured function again, and overwrites its first result."""

from contextlib import nullcontext

import pytest
import torch

from keye_kernels.model import graphs


class FakeGraph:
    """Like a CUDA graph, it reads the captured tensors again. Unlike one, it runs the Python code of the modules again."""

    def __init__(self, run, result):
        self.run, self.result = run, result
        self.replays = 0

    def replay(self):
        self.replays += 1
        self.result.copy_(self.run())


class FakeEvent:
    def record(self, stream):
        self.stream = stream
        stream.events.append("record")

    def synchronize(self):
        self.stream.events.append("synchronize")


class FakeStream:
    def __init__(self):
        self.events = []

    def wait_event(self, event):
        assert isinstance(event, FakeEvent)
        self.events.append("wait")


class FakeGpu:
    """Makes the CPU the device of graphs. `captured` has all graphs, `stream` the current stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.captured: list[FakeGraph] = []
        self.pools: list[object] = []
        self.stream = FakeStream()
        self.reserved_bytes = 0
        monkeypatch.setattr(graphs, "capture", self.capture)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.stream)
        monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.reserved_bytes)

    def capture(self, run, device, pool=None):
        self.pools.append(pool)
        self.reserved_bytes += 1000
        result = run()
        self.captured.append(FakeGraph(run, result))
        return self.captured[-1], result
