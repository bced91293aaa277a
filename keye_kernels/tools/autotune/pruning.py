"""Compiles candidates ahead of time in other processes and says which cannot serve: spills, registers, shared memory."""

import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from keye_kernels.tools.compile import Report
from keye_kernels.triton.tiles import Config


@dataclass(frozen=True)
class Variant:
    """A tile of one kernel, by names: what a process that compiles needs to know."""

    target: str
    kernel: str
    part: str
    dtype: str
    config: tuple[tuple[str, int | str | bool], ...]
    every: bool = False  # all that the tile serves, not the commonest alone

    @classmethod
    def of(cls, target: str, kernel: str, part: str, dtype: str, config: Config, every: bool = False) -> "Variant":
        return cls(target, kernel, part, dtype, tuple(sorted(config.items())), every)


def compile_variant(variant: Variant) -> list[Report]:
    """Runs in a process whose Triton compiles; what is wrong with a tile stands in its reports."""
    from keye_kernels.tools.compile import check

    from .kernels import specs

    found = specs(variant.kernel, variant.part, variant.dtype, variant.target, dict(variant.config))
    return [check(variant.target, variant.kernel, spec) for spec in (found if variant.every else found[:1])]


class Compiler:
    """Reports of variants, each compiled once; Triton's own cache, at TRITON_CACHE_DIR, serves later runs."""

    def __init__(self, executor: Executor):
        self.executor, self.known = executor, {}

    def submit(self, variants: Iterable[Variant]) -> None:
        """Starts what is not known yet."""
        for variant in variants:
            if variant not in self.known:
                self.known[variant] = self.executor.submit(compile_variant, variant)

    def reports(self, variant: Variant) -> list[Report]:
        """Waits for one variant."""
        self.submit([variant])
        return self.known[variant].result()

    def failures(self, variant: Variant) -> list[str]:
        """Why a tile cannot serve; empty where it can."""
        return [failure for report in self.reports(variant) for failure in report.failures]


@contextmanager
def compiler(workers: int | None = None) -> Iterator[Compiler]:
    """A compiler of its own processes: Triton either interprets or compiles for good, as its first import finds it."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "0"
    # Ctrl-C reaches all processes of a terminal: workers that die of it would leave the pool waiting for them for ever
    ignore_interrupts = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    spawn = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers or os.cpu_count(), mp_context=spawn, initializer=ignore_interrupts)
    try:
        yield Compiler(executor)
    finally:
        # Neither waiting for what is being compiled nor, after a second Ctrl-C, for all that is queued
        processes = list((executor._processes or {}).values())
        executor.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
