"""Fixtures of the suite: which sizes and types run, and `measure`, which checks a call before it times it."""

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from .measuring import (
    TOLERANCES,
    Work,
    event_timer,
    flush_l2,
    gpu_info,
    rates,
    relative_error,
    tile_sources,
    versions,
    with_peak_memory,
)
from .peers import Unavailable, is_interpreting

ROUNDS = 20
SLOW, SLOW_ROUNDS = 0.5, 7  # seconds a call from which on fewer rounds must do


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--keye-real", action="store_true", help="real widths and lengths also without a GPU (minutes to hours)"
    )


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Workers share the cores; more threads than those would wait for each other
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
    config.addinivalue_line("markers", "cases(impls, real, smoke): implementations, and sizes by name, of a benchmark")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["gpu"] = gpu_info()


def on_gpu() -> bool:
    return torch.cuda.is_available() and not is_interpreting()


def is_real(config: pytest.Config) -> bool:
    timed_on_gpu = on_gpu() and not config.getoption("benchmark_disable")
    # Collected from elsewhere, this file comes too late to define the option
    return timed_on_gpu or config.getoption("keye_real", default=False)


def sizes(definition: Any) -> dict[str, Any]:
    return definition.get_closest_marker("cases").kwargs["real" if is_real(definition.config) else "smoke"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("cases")
    if marker is None:
        return
    metafunc.parametrize("dtype", ["bfloat16" if on_gpu() else "float32"])
    metafunc.parametrize("shape", list(sizes(metafunc.definition)))
    metafunc.parametrize("impl", marker.kwargs["impls"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if on_gpu() and item.get_closest_marker("cases"):
            # pytest-benchmark reads the closest of its markers only, so that what the test's own says must come along
            options = item.get_closest_marker("benchmark").kwargs
            item.add_marker(pytest.mark.benchmark(**options, timer=event_timer), append=False)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if on_gpu() else "cpu")


@pytest.fixture
def size(request: pytest.FixtureRequest, shape: str) -> Any:
    """What the name `shape` stands for."""
    return sizes(request.node)[shape]


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest, device: torch.device, dtype: str) -> Callable[..., None]:
    """measure(make, expected, work): checks `make()()` against `expected`, then times it and fills `extra_info`.

    `make` raises Unavailable, and the case is skipped with its reason, where the implementation cannot run. A call whose
    output deviates by more than `tolerance` fails, and no number of it is kept.
    """

    def run(make: Callable[[], Callable[[], Any]], expected: Any, work: Work, tolerance: float | None = None) -> None:
        tolerance = TOLERANCES[getattr(torch, dtype)] if tolerance is None else tolerance
        with torch.inference_mode():
            try:
                call = make()
            except Unavailable as reason:
                pytest.skip(str(reason))
            with tile_sources() as sources:
                error = relative_error(call(), expected)
            if not error <= tolerance:
                pytest.fail(f"deviates by {error:.2g} of the largest value, allowed are {tolerance:.2g}: not timed")
            peak, rounds, warmup_rounds = None, 1, 0
            if not benchmark.disabled:
                start = time.perf_counter()
                call()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                quick = time.perf_counter() - start < SLOW
                rounds, warmup_rounds = (ROUNDS, 2) if quick else (SLOW_ROUNDS, 0)
                _, peak = with_peak_memory(call, device)
            setup = flush_l2(device) if device.type == "cuda" else None
            benchmark.pedantic(call, setup=setup, rounds=rounds, warmup_rounds=warmup_rounds)
        median = None if benchmark.disabled else benchmark.stats.stats.median
        benchmark.extra_info |= {
            "tokens": work.tokens,
            "bytes": work.bytes,
            "flops": work.flops,
            **rates(work, median, dtype, gpu_info()),
            "peak_memory_bytes": peak,
            "error": error,
            "tolerance": tolerance,
            "tile_source": ", ".join(sorted(set(sources.values()))) or None,
            "versions": versions(),
        }

    return run
