"""Launching without asking Triton's JIT every time: a tower calls the same few kernels 27 times with like arguments.

The JIT looks at each argument anew, which takes the host longer than a small kernel takes the GPU. Here a variant that was
launched once is found again by what tells variants apart, and launched as it is.
"""

import os
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

MOST_THREADS = 16
_compile_only: ContextVar[bool] = ContextVar("keye_kernels_compile_only", default=False)


@contextmanager
def compile_only() -> Iterator[None]:
    """Launches inside compile their kernel, or find it in Triton's cache, and start nothing."""
    token = _compile_only.set(True)
    try:
        yield
    finally:
        _compile_only.reset(token)


class Kernel:
    """A JIT function whose constexpr parameters come last, and whose integers are not specialised.

    What is left to tell variants apart are the constants, and of each argument the kind: a tensor's dtype and whether it is
    aligned to 16 bytes, an integer's width, a descriptor's block, None. AMD's variants depend on a tensor's size, too: there
    the JIT is asked.
    """

    def __init__(self, function: Any):
        self.function = function
        self.remembers = isinstance(function, JITFunction) and not torch.version.hip  # the interpreter has no variants
        self.variants: dict[tuple, tuple[Any, tuple]] = {}

    def __call__(self, grid: int, *arguments: Any, **constants: Any) -> None:
        """Launches `grid` programs on the current device and stream.

        `constants` are num_warps and num_stages, too, and come in the same order in every call.
        """
        if _compile_only.get():
            self.function.run(*arguments, **constants, grid=(grid,), warmup=True)
            return
        if not self.remembers:
            self.function[grid,](*arguments, **constants)
            return
        key = driver.active.get_current_device(), *map(_kind, arguments), *constants.values()
        if key in self.variants:
            compiled, values = self.variants[key]
            compiled[grid, 1, 1](*arguments, *values)
            return
        compiled = self.function[grid,](*arguments, **constants)
        if hasattr(compiled, "result"):  # another thread compiles ahead
            compiled = compiled.result()
        names = self.function.arg_names[len(arguments) :]
        self.variants[key] = compiled, tuple(constants[name] for name in names)


def _kind(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return -(2**31) <= argument < 2**31
    if isinstance(argument, float):
        return float
    return None if argument is None else tuple(argument.block_shape)


def compile_steps(steps: Sequence[Callable[[], object]], ready: Callable[[], object]) -> tuple[int, int]:
    """Runs the steps without their launches; returns how many kernels were compiled, and how many were found in the cache.

    `ready` is called for each of them. Memory that a kernel would have filled is left as it is: what is computed here means
    nothing.
    """
    hits: list[bool] = []
    listener = knobs.compilation.listener

    def listen(*, cache_hit: bool, **_: Any) -> None:
        hits.append(cache_hit)
        ready()

    knobs.compilation.listener = listen
    try:
        pool = ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1))
        with pool, _beside_each_other(pool), compile_only():
            for step in steps:
                step()
    finally:
        knobs.compilation.listener = listener
    return hits.count(False), hits.count(True)


def _beside_each_other(pool: ThreadPoolExecutor) -> AbstractContextManager:
    """Triton hands what is to be compiled to the pool, and waits for it at the end. A Triton without that: one by one."""
    try:
        from triton.runtime._async_compile import AsyncCompileMode
    except ImportError:
        return nullcontext()
    return AsyncCompileMode(pool)
