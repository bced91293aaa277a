"""Decoding with one launch a token: the few hundred of a step are recorded as a CUDA graph and replayed.

A step of an 8B model keeps a GPU busy for about 6 ms, and its launches the host for two to four times as long.
"""

import logging
import threading
from collections.abc import Callable
from functools import cache
from weakref import WeakSet

import torch
from torch import Tensor, nn

from keye_kernels.ops.implementation import impl_outside_attention, resolve

from .cache import KVCache

WORTH = 8  # steps from which on recording one, which takes as long as one, pays
logger = logging.getLogger(__name__)
_failed: WeakSet = WeakSet()  # models a step of which could not be recorded
_recording = threading.Lock()  # torch records one graph at a time


def decoding_step(model: nn.Module, cache: KVCache, steps: int) -> Callable[[Tensor], Tensor]:
    """Of a `Keye`: a function from the tokens [B, 1] to the logits [B, 1, V] of the next one, to be called about `steps` times.

    The logits are good until its next call. On a CPU, of a compiled model, under autocast (whose cast weights would be the
    recording's), where hooks want to see every step, and where the reference computes, which makes tensors on the host, it is the
    model's own forward.
    """
    if model.device.type == "cuda" and steps >= WORTH and model not in _failed and _is_plain(model):
        return _RecordedStep(model, cache)
    return lambda token: model(token, cache=cache).logits


def _is_plain(model: nn.Module) -> bool:
    """Whether a replay is all that a step does."""
    modules = list(model.modules())
    watched = any(m._forward_hooks or m._forward_pre_hooks or m._compiled_call_impl for m in modules)
    impls = {impl_outside_attention(getattr(module, "impl", "auto")) for module in modules}
    by_kernels = all(resolve(impl, "rope", model.device) == "triton" for impl in impls)
    return not watched and by_kernels and not torch.is_autocast_enabled("cuda")


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: libraries keep a workspace for each stream that they have seen."""
    return torch.cuda.Stream(device)


class _RecordedStep:
    """Runs the first step as it is, so that kernels are compiled and libraries have chosen theirs; records the second."""

    def __init__(self, model: nn.Module, cache: KVCache):
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
        graph, current, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(token.device), _stream(token.device)
        try:
            with _recording, torch.cuda.stream(stream):
                stream.wait_stream(current)
                graph.capture_begin(capture_error_mode="thread_local")  # other threads may allocate meanwhile
                try:
                    self.logits = self.model(self.token, cache=self.cache).logits
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            _failed.add(self.model)
            logger.warning("decoding goes on launch by launch, since a step could not be recorded: %s", error)
            return
        current.wait_stream(stream)
        self.graph = graph
