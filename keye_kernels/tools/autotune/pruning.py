"""Compiles candidates ahead of time in other processes, and finds those that cannot be used: spills, registers, shared memory."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass

from keye_kernels.tools.compile import Report
from keye_kernels.tools.running import worker_pool
from keye_kernels.triton.device import Arch
from keye_kernels.triton.launch_config import Config
from keye_kernels.triton.registry import kernel_spec


@dataclass(frozen=True)
class TuningVariant:
    """A launch config of one kernel, by names only: what a compiling process needs."""

    target: str
    kernel: str
    part: str
    dtype: str
    config: tuple[tuple[str, int | str | bool], ...]
    every: bool = False  # all specializations that the config is used for, not only the most common one

    @classmethod
    def of(cls, target: str, kernel: str, part: str, dtype: str, config: Config, every: bool = False) -> "TuningVariant":
        return cls(target, kernel, part, dtype, tuple(sorted(config.items())), every)


def compile_variant(variant: TuningVariant) -> list[Report]:
    """Runs in a process whose Triton compiles. Empty where a library runs instead."""
    from keye_kernels.tools.compile import check

    config, arch = dict(variant.config), Arch(variant.target)
    found = kernel_spec(variant.kernel).variants(variant.part, variant.dtype, arch, config)
    return [check(variant.target, variant.kernel, one) for one in (found if variant.every else found[:1])]


class Compiler:
    """Reports of variants, each compiled once. Later runs find the kernels in Triton's cache (TRITON_CACHE_DIR)."""

    def __init__(self, executor: Executor):
        self.executor, self.known = executor, {}

    def submit(self, variants: Iterable[TuningVariant]) -> None:
        """Starts compiling those that were not submitted yet."""
        for variant in variants:
            if variant not in self.known:
                self.known[variant] = self.executor.submit(compile_variant, variant)

    def reports(self, variant: TuningVariant) -> list[Report]:
        """Waits for the reports of one variant."""
        self.submit([variant])
        return self.known[variant].result()

    def failures(self, variant: TuningVariant) -> list[str]:
        """Why a config cannot be used; empty if it can."""
        return [failure for report in self.reports(variant) for failure in report.failures]


@contextmanager
def compiler(workers: int | None = None) -> Iterator[Compiler]:
    """A compiler in processes of its own."""
    with worker_pool(workers, "0") as executor:
        yield Compiler(executor)
