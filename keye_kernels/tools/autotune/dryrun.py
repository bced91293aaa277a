"""`autotune --dry-run`: lists what a sweep would try on other GPUs, compiled ahead of time. Nothing is timed or saved."""

import sys

from tqdm import tqdm

from keye_kernels.triton.device import Arch
from keye_kernels.triton.launch_config import Config
from keye_kernels.triton.spec import TuningShape

from .candidates import candidates
from .pruning import TuningVariant, compiler


def dry_run(targets: list[str], shapes: list[TuningShape], dtype: str, workers: int | None = None) -> list[str]:
    """One line per target, kernel, use and config: registers, spills and shared memory of the most common variant.

    Shapes that differ only in their size share most configs; each config is listed once per kernel and use.
    """
    variants: dict[TuningVariant, Config] = {}
    for target in targets:
        for shape in shapes:
            for config in candidates(shape, dtype, Arch(target)):
                variants[TuningVariant.of(target, shape.kernel, shape.part, dtype, config)] = config
    lines = []
    with compiler(workers) as pool:
        pool.submit(variants)
        for variant, config in tqdm(variants.items(), desc="compiling", unit="config", file=sys.stderr, disable=None):
            text = " ".join(f"{name}={value}" for name, value in sorted(config.items()))
            lines.append(f"{variant.target} {variant.kernel} {variant.part}: {text}: {_resources(variant, pool)}")
    return lines


def _resources(variant: TuningVariant, pool) -> str:
    reports = pool.reports(variant)
    if not reports:
        return "runs a library"
    report = reports[0]
    if report.failures:
        return f"rejected: {'; '.join(report.failures)}"
    return f"{report.registers} registers, {report.stack_bytes} bytes spilled, {report.shared_bytes} bytes of shared memory"
