"""Capturing parts of a model as CUDA graphs, and whether a replay still does what a call would do."""

import logging
import threading
from collections.abc import Callable
from functools import cache
from operator import is_
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules import module as torch_module

from keye_kernels.ops.implementation import impl_for, resolve
from keye_kernels.pixel_norm import PixelNorm

T = TypeVar("T")
SETTINGS = frozenset((int, float, str, bool, PixelNorm))  # types of attributes that a forward may depend on
logger = logging.getLogger(__name__)
_capture_lock = threading.Lock()  # torch captures one graph at a time


def capture(run: Callable[[], T], device: torch.device, pool: object = None) -> tuple[torch.cuda.CUDAGraph, T]:
    """Captures the launches of `run`. Returns the graph and the result of `run`, which each replay overwrites.

    `run` must have been called before: compilation, and initialization of libraries, cannot be captured. Graphs with the same
    `pool` share memory, so they must not run at the same time. Raises RuntimeError if something in `run` cannot be captured.
    """
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    stream = _capture_stream(device)
    options: dict[str, Any] = {} if pool is None else {"pool": pool}
    with _capture_lock, torch.cuda.stream(stream):
        stream.wait_stream(current)
        # Other threads may allocate memory during the capture
        graph.capture_begin(capture_error_mode="thread_local", **options)
        try:
            result = run()
        finally:
            graph.capture_end()
    current.wait_stream(stream)
    return graph, result


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures: libraries keep a workspace for each stream that they have run on."""
    return torch.cuda.Stream(device)


def runs_triton(model: nn.Module, device: torch.device) -> bool:
    """Whether Triton kernels run all operators that can: the reference creates tensors on the CPU, which cannot be captured."""
    impls = {impl_for("rope_3d", getattr(module, "impl", "auto")) for module in model.modules()}
    return all(resolve(impl, "rope_3d", device) == "triton" for impl in impls)


class ModuleState:
    """The parameters, settings and structure of modules, to compare with those at another time.

    `is_plain` is False if a call does more than its modules' forwards on their parameters: hooks, compiled modules, tensor
    subclasses. Values of parameters do not count, because a replay reads them again.
    """

    def __init__(self, *roots: nn.Module):
        self.objects: list[object] = []
        self.values: list[object] = []
        self.is_plain = not (torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
        add_object, add_value = self.objects.append, self.values.append
        modules = list(roots)
        for module in modules:  # grows
            attributes = module.__dict__
            if attributes["_forward_hooks"] or attributes["_forward_pre_hooks"] or attributes.get("_compiled_call_impl"):
                self.is_plain = False
            self.objects += module, type(module).forward, attributes.get("forward")
            for value in attributes.values():
                if type(value) in SETTINGS:
                    add_value(value)
            for tensors in (attributes["_parameters"], attributes["_buffers"]):
                for x in tensors.values():
                    add_object(x)
                    if x is None:
                        continue
                    if type(x) not in (Tensor, Parameter):
                        self.is_plain = False
                        return
                    # `x.data = ...` replaces the memory of a parameter
                    add_value((x.data_ptr(), x.shape, x.dtype))
            modules += [child for child in attributes["_modules"].values() if child is not None]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ModuleState) or len(self.objects) != len(other.objects):
            return False
        return self.is_plain == other.is_plain and all(map(is_, self.objects, other.objects)) and self.values == other.values

    __hash__ = None  # type: ignore[assignment]
