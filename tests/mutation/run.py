"""Runs pytest in a copy of the project. Processes start from one that has imported torch, which takes most of a short run."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from pathlib import Path

SECONDS_PER_RUN = 600
NO_TESTS_FAILED, TESTS_FAILED = 0, 1
PRELOADED = ["torch", "torch._dynamo", "triton", "pytest"]

context = multiprocessing.get_context("forkserver")


def start() -> None:
    """Call it once, before the first run."""
    os.environ.setdefault("TRITON_INTERPRET", "1")  # as conftest.py; Triton reads it when it is imported
    context.set_forkserver_preload(PRELOADED)


def run_tests(tests: str, tree: Path, output: Path) -> int:
    """Exit status of pytest in `tree`, whose output goes to a file. A test that hangs or ends the process counts as failed."""
    process = context.Process(target=_run, args=(tests, tree, output))
    process.start()
    process.join(SECONDS_PER_RUN)
    if process.is_alive() or process.exitcode < 0:
        process.kill()
        return TESTS_FAILED
    if process.exitcode not in (NO_TESTS_FAILED, TESTS_FAILED):
        # 2: an import of a test module failed. 4, 5: wrong or no tests
        print(f"pytest {tests}: exit status {process.exitcode}\n{output.read_text()[-2000:]}", file=sys.stderr)
    return process.exitcode


def _run(tests: str, tree: Path, output: Path) -> None:
    import pytest

    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.chdir(tree)
    root = Path(__file__).parents[2]
    sys.path[:] = [str(tree), *(path for path in sys.path if path and Path(path) != root)]
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "keye_kernels")]:
        del sys.modules[name]
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--rootdir", str(tree)]
    with contextlib.suppress(SystemExit):
        status = int(pytest.main([*options, *tests.split()]))
    sys.stdout.flush()
    os._exit(status)
