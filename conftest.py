"""Settings of the test run: kernels in Triton's interpreter, and two worker processes if pytest-xdist is installed."""

import os

# Triton reads this when it is first imported
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

from keye_kernels.ops.implementation import has_triton

if has_triton():
    # Kernels are interpreted or compiled as the variable says when they are imported: before a test changes it
    from keye_kernels.triton.registry import kernel_specs

    kernel_specs()

NUM_WORKERS = 2

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Defaults to `-n 2 --dist worksteal`, without which pytest-xdist runs one process. `-n 0` and `--pdb` keep one."""
    option, is_worker = config.option, hasattr(config, "workerinput")
    if is_worker or not config.pluginmanager.hasplugin("xdist") or option.usepdb:
        return
    if option.numprocesses is None and option.dist == "no" and not option.tx:
        option.numprocesses, option.dist = NUM_WORKERS, "worksteal"
