"""GPU busy time, kernels and launches from events of the profiler."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from keye_kernels.tools.timing import profiling
from keye_kernels.tools.timing.profiling import ProfilerEvent, covered, gpu_activity, profiled, profiler_events

CPU = torch.device("cpu")


def on_gpu(name, start, duration, gpu=0):
    return ProfilerEvent(name, start, duration, gpu)


def on_cpu(name):
    return ProfilerEvent(name, 0, 1000, None)


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        ([], 0),
        ([(5, 9)], 4),
        ([(5, 9), (9, 10)], 5),
        ([(5, 9), (20, 30)], 14),
        ([(5, 9), (6, 7)], 4),  # inside of the first
        ([(5, 9), (6, 12)], 7),
        ([(20, 30), (5, 9), (8, 21)], 25),  # not sorted
        ([(5, 9), (5, 9)], 4),
        ([(0, 100), (10, 20), (30, 110)], 110),
    ],
)
def test_the_union_of_intervals(intervals, expected):
    assert covered(intervals) == expected


def test_the_gpu_is_busy_while_kernels_or_copies_run():
    events = [
        on_gpu("gemm", 1000, 500),
        on_gpu("rope", 1200, 800),  # on another stream at the same time
        on_gpu("Memcpy HtoD (Pageable -> Device)", 5000, 100),
        on_gpu("Memset (Device)", 6000, 10),
        on_gpu("gemm", 7000, 500),
        on_cpu("aten::mm"),
    ]
    found = gpu_activity(events)
    assert found.busy_seconds == pytest.approx((1000 + 100 + 10 + 500) / 1e9)
    assert (found.kernels, found.launches) == (3, 0)
    assert found.slowest[0] == ("gemm", pytest.approx(1000 / 1e9), 2)


@pytest.mark.parametrize(
    "name",
    [
        "cudaLaunchKernel",
        "cudaLaunchKernelExC",
        "cudaLaunchCooperativeKernel",
        "cuLaunchKernel",
        "cuLaunchKernelEx",
        "cudaGraphLaunch",
        "hipLaunchKernel",
        "hipModuleLaunchKernel",
        "hipExtModuleLaunchKernel",
        "hipGraphLaunch",
    ],
)
def test_launches_are_calls_of_the_driver(name):
    others = [
        "cudaMemcpyAsync",
        "cudaStreamSynchronize",
        "aten::mm",
        "cudaEventRecord",
        "cudaFuncGetAttributes",
        "my cudaLaunchKernel",
    ]
    assert gpu_activity([on_cpu(name), on_cpu(name), *map(on_cpu, others)]).launches == 2


def test_a_replayed_graph_is_one_launch_of_many_kernels():
    found = gpu_activity([on_cpu("cudaGraphLaunch"), *(on_gpu("k", 10 * i, 10) for i in range(300))])
    assert (found.kernels, found.launches, found.busy_seconds) == (300, 1, pytest.approx(3e-6))


def test_the_busiest_of_several_gpus_counts():
    assert gpu_activity([on_gpu("a", 0, 10, 0), on_gpu("a", 5, 30, 1)]).busy_seconds == pytest.approx(30e-9)


def test_the_slowest_kernels_are_listed_by_the_sum_of_their_times():
    events = [on_gpu(f"kernel {i}", 100 * i, i) for i in range(20)]
    found = gpu_activity([*events, *(on_gpu("small", 0, 5) for _ in range(5))])
    assert len(found.slowest) == profiling.NUM_SLOWEST
    assert found.slowest[0] == ("small", pytest.approx(25e-9), 5) and found.slowest[1][0] == "kernel 19"


def test_a_profile_of_a_cpu_has_no_work_of_a_gpu():
    assert profiled(lambda: pytest.fail("was called"), CPU) is None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(3).sum()
    assert gpu_activity(profiler_events(profile)) == profiling.GpuActivity(0.0, 0, 0, [])


@pytest.mark.parametrize(
    ("events", "busy", "warning"),
    [
        ([on_gpu("gemm", 0, 10)], 10e-9, None),
        ([on_cpu("cudaLaunchKernel")], None, "the profiler sees no work of the GPU"),
        (RuntimeError("CUPTI_ERROR"), None, "the profiler cannot be used: CUPTI_ERROR"),
    ],
    ids=["works", "no events", "no permission"],
)
def test_a_call_on_a_gpu_is_profiled_up_to_its_end(events, busy, warning, monkeypatch, caplog):
    log = []

    @contextmanager
    def profile(activities):
        log.append([activity.name for activity in activities])
        yield
        if isinstance(events, RuntimeError):
            raise events

    monkeypatch.setattr(torch.profiler, "profile", profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("synchronize"))
    monkeypatch.setattr(profiling, "profiler_events", lambda profile: events)
    found = profiled(lambda: log.append("call"), torch.device("cuda"))
    assert log == ["synchronize", ["CPU", "CUDA"], "call", "synchronize"]
    assert (found and found.busy_seconds) == (busy and pytest.approx(busy))
    assert [record.getMessage() for record in caplog.records] == ([warning] if warning else [])


def test_events_of_a_real_profile_and_annotations_on_the_gpu():
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
        torch.profiler.record_function("mine"),
    ):
        torch.ones(3).sum()
    events = profiler_events(profile)
    total, *_ = [event for event in events if event.name == "aten::sum"]
    assert total.gpu is None and total.duration_ns > 0 and total.start_ns > 0

    def event(name, annotation):
        kind = torch.autograd.DeviceType.CUDA
        fields = {
            "name": name,
            "start_ns": 1,
            "duration_ns": 2,
            "device_index": 3,
            "device_type": kind,
            "is_user_annotation": annotation,
        }
        return SimpleNamespace(**{field: (lambda value=value: value) for field, value in fields.items()})

    results = SimpleNamespace(events=lambda: [event("mine", True), event("gemm", False)])
    profile = SimpleNamespace(profiler=SimpleNamespace(kineto_results=results))
    assert profiler_events(profile) == [ProfilerEvent("gemm", 1, 2, 3)]
