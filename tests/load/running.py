"""Runs the requests one by one, then in threads and processes, and compares the answers, the memory and the open files."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import keye_kernels as kk
from tests.helpers.http_answers import http_server

from .requests import Service, requests, routes, write_files

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
MAX_SAMPLES = 200


@dataclass
class Report:
    """What one process did. A sample is seconds since the start, resident bytes and open files."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    samples: list[tuple[float, int, int]] = field(default_factory=list)
    files_before: int = 0
    files_after: int = 0
    threads_before: int = 0
    threads_after: int = 0

    def memory_growth(self) -> float:
        """Median resident memory of the last quarter of the run, relative to that of its second quarter."""
        quarter = len(self.samples) // 4
        early, late = self.samples[quarter : 2 * quarter], self.samples[-quarter:]
        return statistics.median(sample[1] for sample in late) / statistics.median(sample[1] for sample in early) - 1


def run_load(seconds: float, processes: int, threads: int) -> list[Report]:
    """The reports of `processes` processes, each of which runs random requests in `threads` threads for `seconds`."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, http_server() as server, ProcessPoolExecutor(processes, spawn) as pool:
        write_files(Path(folder))
        server.routes |= routes()
        expected = pool.submit(serial_answers, folder, server.address).result()
        running = [
            pool.submit(concurrent_answers, folder, server.address, expected, seconds, threads, seed) for seed in range(processes)
        ]
        return [future.result() for future in running]


def new_service(folder: str, address: str) -> Service:
    return Service(kk.small_model(), kk.small_processor(), Path(folder), address)


def serial_answers(folder: str, address: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    service = new_service(folder, address)
    return {name: request(service) for name, request in requests().items()}


def concurrent_answers(folder: str, address: str, expected: dict[str, Any], seconds: float, threads: int, seed: int) -> Report:
    torch.set_num_threads(1)
    report, chosen = Report(), requests()
    service = new_service(folder, address)
    # Each request once, so that everything is imported and cached
    run_requests(service, report, chosen, expected, list(chosen))
    gc.collect()
    report.files_before, report.threads_before = open_files(), threading.active_count()
    start = time.monotonic()

    def work(thread: int) -> None:
        names = random.Random(1000 * seed + thread)
        torch.set_num_threads(1)
        while time.monotonic() < start + seconds:
            run_requests(service, report, chosen, expected, [names.choice(list(chosen))])

    with ThreadPoolExecutor(threads) as pool:
        working = [pool.submit(work, thread) for thread in range(threads)]
        while not all(future.done() for future in working):
            report.samples.append((time.monotonic() - start, resident_bytes(), open_files()))
            time.sleep(max(seconds / MAX_SAMPLES, 0.05))
        for future in working:
            future.result()
    gc.collect()
    report.files_after, report.threads_after = open_files(), threading.active_count()
    return report


def run_requests(service: Service, report: Report, chosen: dict, expected: dict[str, Any], names: list[str]) -> None:
    for name in names:
        try:
            answer = chosen[name](service)
        except Exception as error:
            report.wrong.append(f"{name}: {type(error).__name__}: {error}")
            continue
        report.counts[name] += 1
        if answer != expected[name]:
            report.wrong.append(f"{name}: {answer!r:.200} instead of {expected[name]!r:.200}")


def resident_bytes() -> int:
    """Of this process, without memory that was freed and that the allocator keeps."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))
