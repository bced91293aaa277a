"""Runs requests in threads and processes, and checks that answers are right, and that memory and open files do not grow.

    python -m tests.load --minutes 10

Exits with 1 if an answer was wrong or an amount grew.
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("TRITON_INTERPRET", "1")

from .running import Report, run_load

# Memory of threads is freed in another order than it was allocated, so that it varies by a few percent
MAX_MEMORY_GROWTH = 0.05


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.load", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--threads", type=int, default=8, help="in each process")
    options = parser.parse_args()
    reports = run_load(60 * options.minutes, options.processes, options.threads)
    problems = [problem for report in reports for problem in found_problems(report)]
    for number, report in enumerate(reports, 1):
        print(f"process {number}: {report.counts.total()} requests of {len(report.counts)} kinds, {len(report.wrong)} wrong")
        for seconds, memory, files in report.samples[:: max(1, len(report.samples) // 10)]:
            print(f"  {seconds:6.0f} s  {memory / 2**20:6.0f} MiB  {files:3} open files")
        print(f"  open files {report.files_before} before, {report.files_after} after; memory {report.memory_growth():+.1%}")
    print(*problems, sep="\n")
    return 1 if problems else 0


def found_problems(report: Report) -> list[str]:
    problems = list(report.wrong[:20])
    if report.files_after > report.files_before:
        problems.append(f"open files grew from {report.files_before} to {report.files_after}")
    if report.threads_after > report.threads_before:
        problems.append(f"threads grew from {report.threads_before} to {report.threads_after}")
    if report.memory_growth() > MAX_MEMORY_GROWTH:
        problems.append(f"memory grew by {report.memory_growth():.1%}")
    return problems


if __name__ == "__main__":
    sys.exit(main())
