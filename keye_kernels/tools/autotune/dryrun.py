"""`autotune --dry-run`: lists what a sweep would try on other GPUs, compiled ahead of time. Nothing is timed or saved."""

import sys

from tqdm import tqdm

from keye_kernels.triton.device import Arch
from keye_kernels.triton.launch_config import Config
from keye_kernels.triton.spec import TuningShape

from .candidates import candidates
from .pruning import TuningVariant, compiler

REJECTED = "rejected"


def dry_run(targets: list[str], shapes: list[TuningShape], dtype: str, workers: int | None = None) -> tuple[list[str], bool]:
    """One line per target, kernel, use and config: registers, spills and shared memory of the most common variant.

    Shapes that differ only in their size share most configs; each config is listed once per kernel and use. Also returns whether
    a config of each kernel compiles for each target.
    """
    variants: dict[TuningVariant, Config] = {}
    for target in targets:
        for shape in shapes:
            for config in candidates(shape, dtype, Arch(target)):
                variants[TuningVariant.of(target, shape.kernel, shape.part, dtype, config)] = config
    lines, works = [], {(variant.target, variant.kernel): False for variant in variants}
    with compiler(workers) as pool:
        pool.submit(variants)
        for variant, config in tqdm(variants.items(), desc="compiling", unit="config", file=sys.stderr, disable=None):
            text = " ".join(f"{name}={value}" for name, value in sorted(config.items()))
            resources = _resources(variant, pool)
            lines.append(f"{variant.target} {variant.kernel} {variant.part}: {text}: {resources}")
            works[variant.target, variant.kernel] |= not resources.startswith(REJECTED)
    return lines, all(works.values())


def _resources(variant: TuningVariant, pool) -> str:
    reports = pool.reports(variant)
    if not reports:
        return "runs a library"
    report = reports[0]
    if report.failures:
        return f"{REJECTED}: {'; '.join(report.failures)}"
    return f"{report.registers} registers, {report.stack_bytes} bytes spilled, {report.shared_bytes} bytes of shared memory"
