"""CUDA graphs for decoding: a step is captured once and then replayed, one launch per step instead of several hundred.

Without a graph, the CPU needs two to four times as long to launch a step of an 8B model as a GPU needs to run it (about 6 ms).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar
from weakref import WeakSet

import torch

from keye_kernels.plain import calls_forward, has_global_hooks

from .cache import KVCache
from .graphs import capture, logger, runs_triton

if TYPE_CHECKING:
    from .keye import Keye

T = TypeVar("T")
MIN_STEPS_TO_RECORD = 8  # capturing a graph takes about as long as this many steps
_failed: WeakSet = WeakSet()  # models for which capturing failed


def recorded_step(
    model: "Keye", cache: KVCache, run: Callable[[], T], steps: int, generator: torch.Generator | None = None
) -> Callable[[], T]:
    """Returns a function that does what `run` does: a decoding step of `model` that reads and writes the same tensors each time.

    Of these, only those of `cache` may be replaced between steps, by a larger cache. The graph is then captured again.

    With a graph, the result is overwritten by the next call. `generator` is the seeded generator that `run` uses.
    The step runs without a graph if fewer than MIN_STEPS_TO_RECORD `steps` are expected, on a CPU, in a model with
    `cuda_graphs=False`, hooks, replaced forwards or compiled modules, under autocast (a graph would keep its cast weights) and
    with the reference implementation (which creates tensors on the CPU).
    """
    may_record = model.cuda_graphs and model.device.type == "cuda" and model not in _failed
    if may_record and steps >= MIN_STEPS_TO_RECORD and _can_record(model):
        return _RecordedStep(model, cache, run, generator)
    return run


def _can_record(model: "Keye") -> bool:
    """Whether a replay does everything that a forward does."""
    is_plain = all(calls_forward(module) and not module._compiled_call_impl for module in model.modules())
    return is_plain and not has_global_hooks() and runs_triton(model, model.device) and not torch.is_autocast_enabled("cuda")


class _RecordedStep(Generic[T]):
    """Runs the first step without a graph, to compile kernels and initialize libraries; captures the second one."""

    def __init__(self, model: "Keye", cache: KVCache, run: Callable[[], T], generator: torch.Generator | None):
        self.model, self.cache, self.run, self.generator = model, cache, run, generator
        self.graph: torch.cuda.CUDAGraph | None = None
        self.is_warm, self.slots = False, cache.max_length

    def __call__(self) -> T:
        if self.cache.max_length != self.slots:  # the graph would write to the memory of the smaller cache
            self.graph, self.is_warm, self.slots = None, False, self.cache.max_length
        if self.is_warm and self.graph is None and self.model not in _failed:
            self._record()
        if self.graph is None:
            self.is_warm = True
            return self.run()
        self.cache.count += self.tokens
        self.graph.replay()
        return self.result

    def _record(self) -> None:
        count = self.cache.count
        try:
            self.graph, self.result = capture(self.run, self.model.device, generator=self.generator)
            self.tokens = self.cache.count - count
        except RuntimeError as error:
            _failed.add(self.model)
            logger.warning("decoding runs without CUDA graphs, because a step could not be recorded: %s", error)
        self.cache.count = count  # a capture runs nothing
