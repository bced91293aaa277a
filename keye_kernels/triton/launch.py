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
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

MAX_COMPILE_THREADS = 16
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

    def __call__(self, grid: int, *arguments: Any, **constants: Any) -> None:
        """Launches `grid` programs on the current device and stream.

        `constants` are the constexprs, num_warps and num_stages. They must come in the same order in every call.
        """
        if _compile_only.get():
            self.function.run(*arguments, **constants, grid=(grid,), warmup=True)
            return
        if not self.uses_cache:
            with self.lock:
                self.function[grid,](*arguments, **constants)
            return
        key = driver.active.get_current_device(), *map(_kind, arguments), *constants.values()
        if key in self.compiled_kernels:
            compiled, values = self.compiled_kernels[key]
            compiled[grid, 1, 1](*arguments, *values)
            return
        compiled = self.function[grid,](*arguments, **constants)
        if hasattr(compiled, "result"):  # still compiling in another thread
            compiled = compiled.result()
        names = self.function.arg_names[len(arguments) :]
        self.compiled_kernels[key] = compiled, tuple(constants[name] for name in names)


def _kind(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
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
