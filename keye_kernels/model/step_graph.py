"""Decoding with one launch a token: the few hundred of a step are recorded as a CUDA graph and replayed.

A step of an 8B model keeps a GPU busy for about 6 ms, and its launches the host for two to four times as long.
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cache import KVCache

if TYPE_CHECKING:
    from .keye import Keye

WORTH = 8  # steps from which on recording one, which takes as long as one, pays
logger = logging.getLogger(__name__)


def decoding_step(model: "Keye", cache: KVCache, steps: int) -> Callable[[Tensor], Tensor]:
    """A function from the tokens [B, 1] to the logits [B, 1, V] of the next one, to be called about `steps` times.

    The logits are good until its next call. On a CPU, of a compiled model, under autocast (whose cast weights would be the
    recording's), and where hooks want to see every step, it is the model's own forward.
    """
    plain = model._compiled_call_impl is None and not torch.is_autocast_enabled("cuda")
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    if model.device.type == "cuda" and steps >= WORTH and plain and not hooked:
        return _RecordedStep(model, cache)
    return lambda token: model(token, cache=cache).logits


class _RecordedStep:
    """Runs the first step as it is, so that kernels are compiled and libraries have chosen theirs; records the second."""

    def __init__(self, model: "Keye", cache: KVCache):
        self.model, self.cache = model, cache
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm, self.failed = False, False

    def __call__(self, token: Tensor) -> Tensor:
        if self.warm and self.graph is None and not self.failed:
            self._record(token)
        if self.graph is None:
            self.warm = True
            return self.model(token, cache=self.cache).logits
        self.token.copy_(token)
        self.graph.replay()
        return self.logits

    def _record(self, token: Tensor) -> None:
        self.token = token.clone()
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(token.device)
        stream = torch.cuda.Stream(token.device)
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                graph.capture_begin(capture_error_mode="thread_local")  # other threads may allocate meanwhile
                try:
                    self.logits = self.model(self.token, cache=self.cache).logits
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            self.failed = True
            logger.warning("decoding goes on launch by launch, since a step could not be recorded: %s", error)
            return
        current.wait_stream(stream)
        self.graph = graph
