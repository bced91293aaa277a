"""Plants each fault in a copy of the project, runs its tests there, and lists the faults that no test detected.

    python -m tests.mutation                       all faults
    python -m tests.mutation model/positions       faults whose file contains this text

Exits with 1 if a fault survived, and with 2 if its tests fail without the fault too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .fault import ROOT, Fault, all_faults

SECONDS_PER_FAULT = 600
NO_TESTS_FAILED, TESTS_FAILED = 0, 1
NOT_COPIED = shutil.ignore_patterns(".git", "__pycache__", ".venv", ".*_cache", "*.egg-info", "build", "dist")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", help="only faults in files whose path contains one of these texts")
    parser.add_argument("--jobs", type=int, default=1, help="faults tested at the same time")
    options = parser.parse_args()
    chosen = [fault for fault in all_faults() if not options.files or any(text in fault.file for text in options.files)]
    broken = tests_without_fault(sorted({fault.tests for fault in chosen}))
    if broken:
        print("These tests fail without a fault:", *broken, sep="\n  ")
        return 2
    with ThreadPoolExecutor(options.jobs) as pool:
        detected = list(pool.map(is_detected, chosen))
    survivors = [fault for fault, found in zip(chosen, detected, strict=True) if not found]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} faults detected")
    for fault in survivors:
        print(f"survived: {fault.name}\n  - {fault.old}\n  + {fault.new}\n  tests: {fault.tests}")
    return 1 if survivors else 0


def tests_without_fault(commands: list[str]) -> list[str]:
    return [tests for tests in commands if run_tests(tests, ROOT) != NO_TESTS_FAILED]


def is_detected(fault: Fault) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "project"
        shutil.copytree(ROOT, tree, ignore=NOT_COPIED)
        fault.apply(tree)
        detected = run_tests(fault.tests, tree) != NO_TESTS_FAILED
    print("detected" if detected else "SURVIVED", fault.name, flush=True)
    return detected


def run_tests(tests: str, tree: Path) -> int:
    """Exit status of pytest in `tree`. A test that hangs counts as failed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests.split()]
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=SECONDS_PER_FAULT)
    except subprocess.TimeoutExpired:
        return TESTS_FAILED
    if result.returncode not in (NO_TESTS_FAILED, TESTS_FAILED):
        # 2: an import of a test module failed. 4, 5: wrong or no tests.
        print(f"pytest {tests}: exit status {result.returncode}\n{result.stdout[-2000:]}", file=sys.stderr)
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
