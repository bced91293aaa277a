"""Caches compiled kernels per argument signature, so that repeated launches skip the JIT's analysis of the arguments.

The JIT inspects every argument of every launch, which takes the CPU longer than a small kernel takes the GPU. A layer of a model
launches the same few specializations again and again.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ALIGNMENT_BYTES = 16  # of pointers, for which the JIT specializes kernels
MAX_COMPILE_THREADS = 16
_NO_CHANGE = nullcontext()
# The interpreter keeps the running program in global variables
_interpreter_lock = threading.Lock()
_listener_lock = threading.Lock()
_compile_only: ContextVar[bool] = ContextVar("keye_kernels_compile_only", default=False)


@contextmanager
def compile_only() -> Iterator[None]:
    """Inside, launches compile their kernel or find it in Triton's cache, but run nothing."""
    token = _compile_only.set(True)
    try:
        yield
    finally:
        _compile_only.reset(token)


class Kernel:
    """Launches one JIT function whose constexpr parameters come last and whose integers are not specialized.

    A specialization then depends on the constexprs and on the kind of each argument: a tensor's dtype and 16-byte alignment, an
    integer's width, a descriptor's block shape, None. On AMD it also depends on a tensor's size, so the JIT is always called.
    """

    def __init__(self, function: Any):
        self.function = function
        # The interpreter compiles nothing
        is_interpreted = not isinstance(function, JITFunction)
        self.uses_cache = not is_interpreted and not torch.version.hip
        self.lock = _interpreter_lock if is_interpreted else nullcontext()
        self.compiled_kernels: dict[tuple, tuple[Any, tuple]] = {}

    def bind(self, device: torch.device, grid: int, *scalars: Any, **constants: Any) -> "BoundLaunch":
        """A launch of `grid` programs on `device`, with all arguments but the tensors, which come first."""
        return BoundLaunch(self, device, grid, scalars, constants)

    def __call__(self, device: torch.device, grid: int, *arguments: Any, **constants: Any) -> Any:
        """Launches `grid` programs on `device` and its current stream. Returns the compiled kernel if it is cached.

        `constants` are the constexprs, num_warps and num_stages. They must come in the same order in every call.
        """
        with _on_device(device):
            return self._launch(grid, *arguments, **constants)

    def _launch(self, grid: int, *arguments: Any, **constants: Any) -> Any:
        if _compile_only.get():
            self.function.run(*arguments, **constants, grid=(grid,), warmup=True)
            return None
        if not self.uses_cache:
            with self.lock:
                self.function[grid,](*arguments, **constants)
            return None
        key = driver.active.get_current_device(), *map(_kind, arguments), *constants.values()
        if key in self.compiled_kernels:
            compiled, values = self.compiled_kernels[key]
            compiled[grid, 1, 1](*arguments, *values)
            return compiled
        compiled = self.function[grid,](*arguments, **constants)
        if hasattr(compiled, "result"):  # still compiling in another thread
            compiled = compiled.result()
        names = self.function.arg_names[len(arguments) :]
        self.compiled_kernels[key] = compiled, tuple(constants[name] for name in names)
        return compiled


class BoundLaunch:
    """A launch that is repeated with other tensors of the same dtypes: only the alignment of their pointers is checked again."""

    def __init__(self, kernel: Kernel, device: torch.device, grid: int, scalars: tuple, constants: dict[str, Any]):
        self.kernel, self.device, self.grid, self.scalars, self.constants = kernel, device, grid, scalars, constants
        self.run: Callable[..., object] | None = None  # the compiled kernel for tensors that are all aligned to 16 bytes
        self.values: tuple = ()

    def __call__(self, *tensors: Tensor | None) -> None:
        address = 0
        for x in tensors:
            if x is not None:
                address |= x.data_ptr()
        is_aligned = not address % ALIGNMENT_BYTES
        if is_aligned and self.run is not None and not _compile_only.get():
            with _on_device(self.device):
                self.run(*tensors, *self.scalars, *self.values)
            return
        compiled = self.launch(*tensors)
        if is_aligned and compiled is not None:
            names = self.kernel.function.arg_names[len(tensors) + len(self.scalars) :]
            self.values = tuple(self.constants[name] for name in names)
            self.run = compiled[self.grid, 1, 1]

    def launch(self, *arguments: Any) -> Any:
        """Without the shortcut. Arguments may be tensor descriptors, whose block shapes are part of the specialization."""
        return self.kernel(self.device, self.grid, *arguments, *self.scalars, **self.constants)


def _on_device(device: torch.device) -> AbstractContextManager:
    """Makes `device` the current one, where there are several."""
    return torch.cuda.device(device) if device.type == "cuda" and _num_gpus() > 1 else _NO_CHANGE


@cache
def _num_gpus() -> int:
    return torch.cuda.device_count()


def _kind(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % ALIGNMENT_BYTES == 0
    if isinstance(argument, int):
        return -(2**31) <= argument < 2**31
    if isinstance(argument, float):
        return float
    return None if argument is None else tuple(argument.block_shape)


def compile_steps(steps: Sequence[Callable[[], object]], on_kernel: Callable[[], object]) -> tuple[int, int]:
    """Runs the steps without launching anything. Returns how many kernels were compiled and how many were in Triton's cache.

    `on_kernel` is called for each kernel. Outputs are uninitialized memory: the values computed here have no meaning.
    """
    hits: list[bool] = []

    def listen(*, cache_hit: bool, **_: Any) -> None:
        hits.append(cache_hit)
        on_kernel()

    with _listener_lock:
        listener = knobs.compilation.listener
        knobs.compilation.listener = listen
        try:
            pool = ThreadPoolExecutor(min(MAX_COMPILE_THREADS, os.cpu_count() or 1))
            with pool, _parallel_compilation(pool), compile_only():
                for step in steps:
                    step()
        finally:
            knobs.compilation.listener = listener
    return hits.count(False), hits.count(True)


def _parallel_compilation(pool: ThreadPoolExecutor) -> AbstractContextManager:
    """Triton compiles in the pool and waits for it at the end; versions without that mode compile one kernel after another."""
    try:
        from triton.runtime._async_compile import AsyncCompileMode
    except ImportError:
        return nullcontext()
    return AsyncCompileMode(pool)
