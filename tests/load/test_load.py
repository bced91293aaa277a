"""A short load test, and its checks: each of them reports a fault that is planted."""

import os

import pytest

from tests.load.__main__ import found_problems
from tests.load.running import Report, run_load

# The threads take turns on the CPU, so that a short run finds races too
SECONDS, PROCESSES, THREADS = 4, 2, 4


def test_concurrent_requests_equal_serial_ones():
    for report in run_load(SECONDS, PROCESSES, THREADS):
        assert report.wrong == []
        assert report.files_after <= report.files_before
        assert report.threads_after <= report.threads_before
        assert report.counts.total() > len(report.counts) > 20


@pytest.mark.parametrize(
    ("problem", "changes"),
    [
        ("image: 1 instead of 2", {"wrong": ["image: 1 instead of 2"]}),
        ("open files grew", {"files_after": 13}),
        ("threads grew", {"threads_after": 2}),
        ("memory grew", {"samples": [(time, 1000 + time, 10) for time in range(400)]}),
    ],
)
def test_problems_are_reported(problem, changes):
    flat = [(time, 1000 + time % 3, 10) for time in range(400)]
    sound = {"wrong": [], "samples": flat, "files_before": 12, "files_after": 12, "threads_before": 1, "threads_after": 1}
    assert found_problems(Report(**sound)) == []
    (found,) = found_problems(Report(**(sound | changes)))
    assert problem in found


def test_open_files_are_counted():
    from tests.load.running import open_files

    before = open_files()
    reading, writing = os.pipe()
    assert open_files() == before + 2
    os.close(reading)
    os.close(writing)
