"""CUDA graphs for decoding: a step is captured once and then replayed, one launch per token instead of several hundred.

Without a graph, the CPU needs two to four times as long to launch a step of an 8B model as a GPU needs to run it (about 6 ms).
Symbols: B sequences, V vocabulary size.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor

from .cache import KVCache
from .graphs import capture, logger, runs_triton

if TYPE_CHECKING:
    from .keye import Keye

MIN_STEPS_TO_RECORD = 8  # capturing a graph takes about as long as this many steps
_failed: WeakSet = WeakSet()  # models for which capturing failed


def decoding_step(model: "Keye", cache: KVCache, steps: int) -> Callable[[Tensor], Tensor]:
    """Returns a function that runs one decoding step: tokens [B, 1] to logits [B, 1, V].

    `cache` holds the prompt. With a graph, the logits are overwritten by the next call. The step runs without a graph if fewer
    than MIN_STEPS_TO_RECORD `steps` are expected, on a CPU, in a model with `cuda_graphs=False`, hooks or compiled modules, under
    autocast (a graph would keep its cast weights) and with the reference implementation (which creates tensors on the CPU).
    """
    may_record = model.cuda_graphs and model.device.type == "cuda" and model not in _failed
    if may_record and steps >= MIN_STEPS_TO_RECORD and _can_record(model):
        return _RecordedStep(model, cache)
    return lambda token: model(token, cache=cache).logits


def _can_record(model: "Keye") -> bool:
    """Whether a replay does everything that a forward does."""
    has_hooks = any(m._forward_hooks or m._forward_pre_hooks or m._compiled_call_impl for m in model.modules())
    return not has_hooks and runs_triton(model, model.device) and not torch.is_autocast_enabled("cuda")


class _RecordedStep:
    """Runs the first step without a graph, to compile kernels and initialize libraries; captures the second one."""

    def __init__(self, model: "Keye", cache: KVCache):
        self.model, self.cache = model, cache
        self.graph: torch.cuda.CUDAGraph | None = None
        self.is_warm = False

    def __call__(self, token: Tensor) -> Tensor:
        if self.is_warm and self.graph is None and self.model not in _failed:
            self._record(token)
        if self.graph is None:
            self.is_warm = True
            return self.model(token, cache=self.cache).logits
        self.token.copy_(token)
        self.graph.replay()
        return self.logits

    def _record(self, token: Tensor) -> None:
        self.token = token.clone()
        try:
            self.graph, self.logits = capture(lambda: self.model(self.token, cache=self.cache).logits, token.device)
        except RuntimeError as error:
            _failed.add(self.model)
            logger.warning("decoding runs without CUDA graphs, because a step could not be recorded: %s", error)
