"""Limits memory and torch's threads while fuzzers run."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Beyond what the process has mapped already. An image of Pillow's largest accepted size takes about 1.3 GB while it is converted
MAX_NEW_BYTES = 4 * 2**30


@pytest.fixture(autouse=True)
def limited_memory() -> Iterator[None]:
    """An allocation beyond the limit fails, and `harness.check` reports the exception."""
    mapped_pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped_pages * resource.getpagesize() + MAX_NEW_BYTES, hard))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of a second thread, tiny inputs only have the start-up time
    yield
    torch.set_num_threads(threads)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
