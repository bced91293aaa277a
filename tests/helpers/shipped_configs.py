"""Compiles the launch configs of the package's tables for the GPU that each was timed on.

    python -m tests.helpers.shipped_configs

Exit code 1 if an entry does not compile, spills in a loop, or needs more registers or shared memory than the GPU has.
"""

import json
import sys

from keye_kernels.tools.autotune.pruning import TuningVariant, compiler
from keye_kernels.triton.device import Arch
from keye_kernels.triton.launch_config import PACKAGE_TABLES
from keye_kernels.triton.registry import kernel_spec
from keye_kernels.triton.spec import TORCH_DTYPES, TuningShape

TARGETS = {"NVIDIA H200": "sm_90"}  # of the devices with a table
DTYPE_NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in TORCH_DTYPES.items()}


def shipped_variants() -> list[TuningVariant]:
    """Each config of the tables once."""
    found = {}
    for path in sorted(PACKAGE_TABLES.glob("*.json")):
        table = json.loads(path.read_text(encoding="utf-8"))
        target = TARGETS[table["device"]]
        for kernel, entries in table["kernels"].items():
            spec = kernel_spec(kernel)
            for entry in entries:
                dtype = DTYPE_NAMES[entry["dtype"]]
                shape = TuningShape(kernel, spec.part_of(entry), 1, 1)
                config = {**spec.heuristic(shape, dtype, Arch(target)), **entry["config"]}
                found[TuningVariant.of(target, kernel, shape.part, dtype, config, every=True)] = None
    return list(found)


def failures(variants: list[TuningVariant], workers: int | None = None) -> list[str]:
    """One sentence per variant that cannot be used."""
    with compiler(workers) as pool:
        pool.submit(variants)
        return [f"{v.target} {v.kernel} {v.part} {dict(v.config)}: {why}" for v in variants for why in pool.failures(v)]


def main() -> int:
    variants = shipped_variants()
    found = failures(variants)
    print("\n".join([f"{len(variants)} launch configs compiled, {len(found)} failures", *found]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
