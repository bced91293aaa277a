"""CUDA graphs of parts of a model: capturing, buckets of input sizes, and whether a replay still does what a call would do.

A graph of a bucket serves all inputs up to a size, which are copied into tensors of that size.
"""

import logging
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from functools import cache
from operator import is_
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._python_dispatch import _get_current_dispatch_mode

from keye_kernels.ops.implementation import impl_for, resolve
from keye_kernels.pixel_norm import PixelNorm
from keye_kernels.plain import has_global_hooks

from .config import KeyeConfig, VisionConfig

T = TypeVar("T")
# Types of attributes that a forward may depend on
SETTINGS = frozenset((int, float, str, bool, tuple, PixelNorm, KeyeConfig, VisionConfig))
CALLS_TO_CAPTURE = 2  # the first call of a bucket compiles kernels and initializes libraries
MAX_GRAPHS = 16  # of one part of a model; the least recently used one is freed
DEVICE_TYPES = ("cuda",)
# Packages whose modules depend on nothing but parameters, buffers and SETTINGS
KNOWN_PACKAGES = ("torch.nn.", "keye_kernels.")
logger = logging.getLogger(__name__)
_capture_lock = threading.Lock()  # torch captures one graph at a time


class GraphMemory(NamedTuple):
    """Attributes: `captured`, the number of graphs; `bytes`, GPU memory that they hold, with their inputs and outputs."""

    captured: int
    bytes: int


def capture(
    run: Callable[[], T], device: torch.device, pool: Any = None, generator: torch.Generator | None = None
) -> tuple[torch.cuda.CUDAGraph, T]:
    """Captures the launches of `run`. Returns the graph and the result of `run`, which each replay overwrites.

    `run` must have been called before: compilation, and initialization of libraries, cannot be captured. Graphs with the same
    `pool` share memory, so they must not run at the same time. `run` may use `generator` besides torch's default generator.
    Raises RuntimeError if something in `run` cannot be captured.
    """
    current, stream = torch.cuda.current_stream(device), _capture_stream(device)
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    with _capture_lock, torch.cuda.stream(stream):
        stream.wait_stream(current)
        try:
            captured = _captured(run, pool, generator)
        except BaseException:
            _recover(device, pool, generator)
            raise
    current.wait_stream(stream)
    return captured


def _captured(run: Callable[[], T], pool: Any, generator: torch.Generator | None) -> tuple[torch.cuda.CUDAGraph, T]:
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    # Other threads may allocate memory during the capture
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        result = run()
    finally:
        graph.capture_end()
    return graph, result


def _recover(device: torch.device, pool: Any, generator: torch.Generator | None) -> None:
    """Ends what a failed `capture_end` leaves unfinished in torch, so that its allocator and random generators work again."""
    index = torch.cuda.current_device() if device.index is None else device.index
    with suppress(RuntimeError):  # unless it has ended
        before_2_8 = getattr(torch._C, "_cuda_endAllocateCurrentStreamToPool", None)
        end = before_2_8 or torch._C._cuda_endAllocateToPool
        end(index, pool)
        torch._C._cuda_releasePool(index, pool)
    # Until a capture succeeds, the generators of one that failed refuse to run outside of a graph
    with suppress(RuntimeError):
        x = torch.zeros(1, device=device)
        _captured(lambda: x.add_(1), torch.cuda.graph_pool_handle(), generator)


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures: libraries keep a workspace for each stream that they have run on."""
    return torch.cuda.Stream(device)


def runs_triton(model: nn.Module, device: torch.device) -> bool:
    """Whether Triton kernels run all operators that can: the reference creates tensors on the CPU, which cannot be captured."""
    impls = {impl_for("rope_3d", getattr(module, "impl", "auto")) for module in model.modules()}
    return all(resolve(impl, "rope_3d", device) == "triton" for impl in impls)


class Entry(ABC):
    """One bucket: tensors for the inputs and, from the second call on, a graph. Subclasses add the inputs, and `forward`."""

    def __init__(self, modules: Sequence[nn.Module], state: "ModuleState", device: torch.device):
        self.modules, self.state, self.device = modules, state, device
        # A graph may run once more after a parameter was replaced
        self.kept = [x.detach() for module in modules for x in module.parameters()]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.bytes = 0

    @abstractmethod
    def forward(self) -> Tensor:
        """The output of the bucket's size."""

    def is_valid(self, modules: Sequence[nn.Module]) -> bool:
        return self.state == ModuleState(*modules)

    def run(self) -> Tensor:
        """The output of the bucket's size, which the next replay overwrites."""
        if self.graph is None:
            return self.forward()
        self.graph.replay()
        return self.output

    def capture(self, pool: Any) -> None:
        before = torch.cuda.memory_reserved(self.device)
        self.graph, self.output = capture(self.forward, self.device, pool)
        self.bytes += max(0, torch.cuda.memory_reserved(self.device) - before)


E = TypeVar("E", bound=Entry)


class GraphCache:
    """The graphs of one part of a model: captured at the second call of their bucket, dropped if a module changes."""

    doing = "a part of the model runs"  # for the log

    def __init__(self) -> None:
        self._entries: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._has_failed = False
        self._pool: Any = None
        self._last_use: torch.cuda.Event | None = None

    def __reduce__(self) -> tuple:
        return type(self), ()  # a copy of the model captures its own graphs

    def clear(self) -> None:
        """Frees the graphs and their memory. They are captured again when they are needed, also after a failed capture."""
        with self._lock:
            self._clear()
            self._has_failed = False

    def _clear(self) -> None:
        self._wait()
        self._entries.clear()
        self._pool = None

    def _wait(self) -> None:
        """Before memory is freed: the last graph may still run, on another stream than that of the memory."""
        if self._last_use is not None:
            self._last_use.synchronize()

    def memory(self) -> GraphMemory:
        """What the captured graphs hold."""
        with self._lock:
            captured = [entry.bytes for entry in self._entries.values() if entry.graph is not None]
        return GraphMemory(len(captured), sum(captured))

    def may_run(self, device: torch.device) -> bool:
        """Whether nothing but the result of a call is wanted: no gradients, no cast weights, no trace."""
        if self._has_failed or device.type not in DEVICE_TYPES or torch.is_grad_enabled():
            return False
        if torch.is_autocast_enabled(device.type) or torch._C._len_torch_function_stack():
            return False
        return _get_current_dispatch_mode() is None and not torch.cuda.is_current_stream_capturing()

    def run(
        self,
        modules: Sequence[nn.Module],
        device: torch.device,
        bucket: Hashable,
        make: Callable[["ModuleState"], E],
        set_inputs: Callable[[E], object],
        take: Callable[[E, Tensor], T],
    ) -> T | None:
        """Runs the forward of a bucket, through its graph if there is one. None if it has to run without a graph.

        `make` makes the entry of a new bucket. `take` copies what is needed out of the output of the bucket's size. `modules` run
        in the forward, and nothing else that may change does.
        """
        mode = torch.is_inference_mode_enabled()
        # Settings that choose the library's kernels when a graph is captured
        bucket = bucket, torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
        with self._lock, torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
            entry = self._entry(modules, device, bucket, make)
            if entry is None:
                return None
            stream = torch.cuda.current_stream(device)
            if self._last_use is not None:  # on another stream, an earlier input may still be read
                stream.wait_event(self._last_use)
            try:
                set_inputs(entry)
                output = entry.run()
            except BaseException:
                if entry.graph is None:  # the next call would capture what has not been compiled
                    del self._entries[bucket]
                raise
            # Checked while the GPU runs the graph
            is_valid = entry.is_valid(modules)
            with torch.inference_mode(mode), torch.no_grad():
                result = take(entry, output) if is_valid else None
            self._last_use = torch.cuda.Event()
            self._last_use.record(stream)
            if not is_valid:
                self._clear()
            return result

    def _entry(
        self, modules: Sequence[nn.Module], device: torch.device, bucket: Hashable, make: Callable[["ModuleState"], E]
    ) -> E | None:
        """The entry of a bucket, ready to run; None if the modules cannot be captured."""
        entry = self._entries.get(bucket)
        if entry is not None and entry.graph is None and not entry.is_valid(modules):
            self._clear()
            entry = None
        if entry is None:
            state = ModuleState(*modules)
            if not state.is_plain or not all(runs_triton(module, device) for module in modules):
                return None
            entry = self._entries[bucket] = make(state)
            while len(self._entries) > MAX_GRAPHS:
                self._wait()
                self._entries.popitem(last=False)
        elif entry.graph is None:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            try:
                entry.capture(self._pool)
            except RuntimeError as error:
                self._has_failed = True
                self._clear()
                logger.warning("%s without CUDA graphs, because a graph could not be captured: %s", self.doing, error)
                return None
        self._entries.move_to_end(bucket)
        return entry


class ModuleState:
    """The parameters, settings and structure of modules, to compare with those at another time.

    `is_plain` is False if a call may do more than the known forwards on their parameters: hooks, compiled modules, replaced
    forwards, modules of other packages (adapters, for instance), tensor subclasses. Values of parameters do not
    count, because a replay reads them again.
    """

    def __init__(self, *roots: nn.Module):
        self.objects: list[object] = []
        self.values: list[object] = []
        self.is_plain = not has_global_hooks()
        add_value = self.values.append
        modules = list(roots)
        for module in modules:  # grows
            attributes = module.__dict__
            if attributes["_forward_hooks"] or attributes["_forward_pre_hooks"] or attributes.get("_compiled_call_impl"):
                self.is_plain = False
            if "forward" in attributes or not type(module).__module__.startswith(KNOWN_PACKAGES):
                self.is_plain = False
            self.objects += module, type(module).forward
            for value in attributes.values():
                if type(value) in SETTINGS:
                    add_value(value)
                elif type(value) is list:
                    add_value(tuple(value))
            for tensors in (attributes["_parameters"], attributes["_buffers"]):
                for x in tensors.values():
                    if x is None:
                        add_value(None)
                        continue
                    if type(x) not in (Tensor, Parameter):
                        self.is_plain = False
                        return
                    # `x.data = ...` replaces the memory of a parameter
                    add_value((x.data_ptr(), x.shape, x.stride(), x.dtype))
            modules += [child for child in attributes["_modules"].values() if child is not None]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ModuleState) or len(self.objects) != len(other.objects):
            return False
        return self.is_plain == other.is_plain and all(map(is_, self.objects, other.objects)) and self.values == other.values
