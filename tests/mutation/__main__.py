"""Plants each fault in a copy of the project, runs its tests there, and lists the faults that no test detected.

    python -m tests.mutation                       all faults
    python -m tests.mutation model/positions       faults whose file contains this text

Exits with 1 if a fault survived, and with 2 if its tests fail without the fault too.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import run
from .fault import ROOT, Fault, all_faults

NOT_COPIED = shutil.ignore_patterns(".git", "__pycache__", ".venv", ".*_cache", "*.egg-info", "build", "dist")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", help="only faults in files whose path contains one of these texts")
    parser.add_argument("--jobs", type=int, default=1, help="faults tested at the same time")
    options = parser.parse_args()
    chosen = [fault for fault in all_faults() if not options.files or any(text in fault.file for text in options.files)]
    run.start()
    with ThreadPoolExecutor(options.jobs) as pool:
        # Files, not combinations of files: several faults share them
        tests = sorted({argument for fault in chosen for argument in fault.tests.split()})
        broken = [name for name, status in zip(tests, pool.map(test_copy, tests), strict=True) if status != run.NO_TESTS_FAILED]
        if broken:
            print("These tests fail without a fault:", *broken, sep="\n  ")
            return 2
        detected = list(pool.map(is_detected, chosen))
    survivors = [fault for fault, found in zip(chosen, detected, strict=True) if not found]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} faults detected")
    for fault in survivors:
        print(f"survived: {fault.name}\n  - {fault.old}\n  + {fault.new}\n  tests: {fault.tests}")
    return 1 if survivors else 0


def test_copy(tests: str, fault: Fault | None = None) -> int:
    """Exit status of these tests in a copy of the project, with the fault if there is one."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "project"
        shutil.copytree(ROOT, tree, ignore=NOT_COPIED)
        if fault is not None:
            fault.apply(tree)
        return run.run_tests(tests, tree, Path(folder) / "output")


def is_detected(fault: Fault) -> bool:
    start = time.perf_counter()
    detected = test_copy(fault.tests, fault) != run.NO_TESTS_FAILED
    print("detected" if detected else "SURVIVED", fault.name, f"{time.perf_counter() - start:.0f} s", flush=True)
    return detected


if __name__ == "__main__":
    sys.exit(main())
