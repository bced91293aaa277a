"""Fixtures of the benchmarks: sizes and dtypes, and `measure`, which checks the output of a call before it times the call.

`pytest benchmarks/` times the calls. A plain `pytest` in the root of the repository only checks them, at small sizes, and does
not need pytest-benchmark.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from keye_kernels.tools.timing import clock
from keye_kernels.tools.timing.measuring import (
    TOLERANCES,
    RequiredWork,
    config_sources,
    event_timer,
    flush_l2,
    gpu_info,
    rates,
    relative_error,
    versions,
    with_peak_memory,
)
from keye_kernels.tools.timing.peers import Unavailable, is_interpreting
from keye_kernels.tools.timing.profiling import GpuActivity, profiled

REPOSITORY = Path(__file__).resolve().parents[1]
ROUNDS, WARMUP_ROUNDS = 20, 2
SLOW_CALL_SECONDS = 0.5  # slower calls get fewer rounds and no warm-up
SLOW_CALL_ROUNDS = 7


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--keye-real", action="store_true", help="use the real sizes on a machine without a GPU too (takes hours)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cases(impls, real, smoke): the implementations and the named sizes to compare")
    config.addinivalue_line("markers", "benchmark(group): the table that pytest-benchmark prints this case in")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["gpu"] = gpu_info()


def times_calls(config: pytest.Config) -> bool:
    """Whether this run times the calls: not from the root of the repository, not in parallel workers."""
    return (
        config.rootpath != REPOSITORY
        and "PYTEST_XDIST_WORKER" not in os.environ
        and not config.getoption("benchmark_disable", default=True)
    )


def on_gpu() -> bool:
    return torch.cuda.is_available() and not is_interpreting()


def sizes(definition: Any) -> dict[str, Any]:
    """The named sizes of a test: the real ones in a timed run on a GPU, or with --keye-real."""
    config = definition.config
    # The option is missing if pytest was started in a folder that does not load this file before it parses options
    is_real = (on_gpu() and times_calls(config)) or config.getoption("keye_real", default=False)
    return definition.get_closest_marker("cases").kwargs["real" if is_real else "smoke"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("cases")
    if marker is None:
        return
    metafunc.parametrize("dtype", ["bfloat16" if on_gpu() else "float32"])
    metafunc.parametrize("shape", list(sizes(metafunc.definition)))
    metafunc.parametrize("impl", marker.kwargs["impls"])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Requests pytest-benchmark's fixture for every case of a timed run, with CUDA events as the timer on a GPU."""
    for item in items:
        if not times_calls(config) or item.get_closest_marker("cases") is None:
            continue
        if "benchmark" not in item.fixturenames:
            item.fixturenames.append("benchmark")
        if on_gpu():
            # pytest-benchmark reads the closest marker only, so it must repeat the options of the test's own marker
            options = item.get_closest_marker("benchmark").kwargs
            item.add_marker(pytest.mark.benchmark(**options, timer=event_timer), append=False)


@pytest.fixture
def is_timed(request: pytest.FixtureRequest) -> bool:
    return times_calls(request.config)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if on_gpu() else "cpu")


@pytest.fixture
def size(request: pytest.FixtureRequest, shape: str) -> Any:
    """The size with the name `shape`."""
    return sizes(request.node)[shape]


@pytest.fixture(scope="session")
def floors() -> dict[tuple[str, str], float]:
    """Seconds of the floor by test and shape: it is the same for all implementations."""
    return {}


@pytest.fixture
def measure(
    request: pytest.FixtureRequest, is_timed: bool, device: torch.device, dtype: str, floors: dict[tuple[str, str], float]
) -> Callable[..., None]:
    """A function `measure(make, expected, work, tolerance=None, floor=None)` that checks a call and, in a timed run, times it.

    `make()` returns the call. If `make` raises `Unavailable`, the case is skipped. If the relative error of `call()` exceeds
    the tolerance, the case fails and no time is recorded. On a GPU, the call is also profiled, and `floor()` returns the call
    whose time is the floor.
    """

    def check(
        make: Callable[[], Callable[[], Any]],
        expected: Any,
        work: RequiredWork,
        tolerance: float | None = None,
        floor: Callable[[], Callable[[], Any]] | None = None,
    ) -> None:
        tolerance = TOLERANCES[getattr(torch, dtype)] if tolerance is None else tolerance
        with torch.inference_mode():
            try:
                call = make()
            except Unavailable as reason:
                pytest.skip(str(reason))
            with config_sources() as sources:
                error = relative_error(call(), expected)
            if not error <= tolerance:
                pytest.fail(f"the relative error is {error:.2g}, at most {tolerance:.2g} is allowed: not timed")
            if not is_timed:
                return
            benchmark = request.getfixturevalue("benchmark")
            rounds, warmup_rounds = _choose_rounds(call, device)
            _, peak = with_peak_memory(call, device)
            setup = flush_l2(device) if device.type == "cuda" else None
            benchmark.pedantic(call, setup=setup, rounds=rounds, warmup_rounds=warmup_rounds)
            on_device = {}
            if device.type == "cuda":
                key = (request.node.originalname, request.node.callspec.params["shape"])
                if floor is not None and key not in floors:
                    floors[key] = clock.measure(floor(), device).median
                on_device = gpu_fields(profiled(call, device), floors.get(key), benchmark.stats.stats.median)
        benchmark.extra_info |= {
            "tokens": work.tokens,
            "bytes": work.bytes,
            "flops": work.flops,
            **rates(work, benchmark.stats.stats.median, dtype, gpu_info()),
            "peak_memory_bytes": peak,
            "error": error,
            "tolerance": tolerance,
            "config_source": ", ".join(sorted(set(sources.values()))) or None,
            "versions": versions(),
            **on_device,
        }

    return check


def gpu_fields(activity: GpuActivity | None, floor_seconds: float | None, median: float) -> dict[str, Any]:
    """What the GPU did during the call, if it is known, and the share of the floor."""
    share = {"share_of_floor": None if floor_seconds is None else floor_seconds / median}
    if activity is None:
        return share
    busy = {"gpu_busy_seconds": activity.busy_seconds, "kernels": activity.kernels, "launches": activity.launches}
    return busy | share


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """A line per case with the work of the GPU, which pytest-benchmark's table does not have."""
    session = getattr(config, "_benchmarksession", None)
    found = [one for one in getattr(session, "benchmarks", ()) if one.extra_info.get("gpu_busy_seconds") is not None]
    if not found:
        return
    terminalreporter.section("GPU: wall time, GPU busy, kernels, launches by the CPU, share of the floor")
    for one in found:
        extra, share = one.extra_info, one.extra_info["share_of_floor"]
        times = f"{one.stats.median * 1e3:10.3f} ms {extra['gpu_busy_seconds'] * 1e3:10.3f} ms"
        floor = "" if share is None else f" {share:8.1%}"
        terminalreporter.write_line(f"{one.name:80} {times} {extra['kernels']:6} {extra['launches']:6}{floor}")


def _choose_rounds(call: Callable[[], Any], device: torch.device) -> tuple[int, int]:
    """(rounds, warm-up rounds) for a call, from the time of one call."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    is_slow = time.perf_counter() - start >= SLOW_CALL_SECONDS
    return (SLOW_CALL_ROUNDS, 0) if is_slow else (ROUNDS, WARMUP_ROUNDS)
