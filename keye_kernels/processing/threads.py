"""Applies a function to images in several threads. Pillow and numpy release the GIL while they decode, resize and copy."""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, TypeVar

import torch

# Helper threads of all calls in a process together. Each decodes one image at a time, in memory of its own.
MAX_HELPER_THREADS = 8

Item = TypeVar("Item")
Result = TypeVar("Result")

_helpers: Executor


def _make_helpers() -> None:
    """The pool starts its threads when they are needed. A forked process has none of the threads of its parent."""
    global _helpers
    _helpers = ThreadPoolExecutor(MAX_HELPER_THREADS, thread_name_prefix="keye_kernels images")


_make_helpers()
os.register_at_fork(after_in_child=_make_helpers)


def map_in_threads(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int | None = None,
    on_done: Callable[[], object] = lambda: None,
) -> list[Result]:
    """`[function(item) for item in items]`, in the calling thread and helper threads.

    After an error no further item is started, and the error of the first item that failed, in their order, is raised. There are
    `threads` threads, by default `torch.get_num_threads()`, as long as all calls together have at most `MAX_HELPER_THREADS`
    helpers. One item is left to the caller. `on_done` is called after each item, by one thread at a time.
    """
    run = _Run(function, list(items), on_done)
    count = min(len(run.items), threads or torch.get_num_threads()) - 1
    own: AbstractContextManager[Executor] = ThreadPoolExecutor(count) if threads and count > 0 else nullcontext(_helpers)
    with own as helpers:
        started: list[Future[None]] = []
        try:
            with suppress(RuntimeError):  # the system has no more threads, or the interpreter is ending
                for _ in range(min(count, threads or MAX_HELPER_THREADS)):
                    # Helpers see the context variables of the caller
                    started.append(helpers.submit(contextvars.copy_context().run, run.work))
            run.work()
        finally:
            run.stop()
            for helper in started:
                # A busy machine may not have started it yet
                if not helper.cancel():
                    helper.result()
    return run.results()


class _Run:
    def __init__(self, function: Callable[[Any], Any], items: list[Any], on_done: Callable[[], object]) -> None:
        self.items = items
        self._function, self._on_done = function, on_done
        self._lock = threading.Lock()
        self._next = 0
        self._results: list[Any] = [None] * len(items)
        self._errors: dict[int, BaseException] = {}

    def work(self) -> None:
        """Takes one item after the other, in order, until none is left or one has failed."""
        while True:
            with self._lock:
                index = self._next
                if index >= len(self.items) or self._errors:
                    return
                self._next += 1
            try:
                self._results[index] = self._function(self.items[index])
                with self._lock:
                    self._on_done()
            except BaseException as error:  # raised again by the calling thread
                self._errors[index] = error

    def stop(self) -> None:
        """No further item is started."""
        self._next = len(self.items)

    def results(self) -> list[Any]:
        if self._errors:
            # Items are started in order, so all before the first one that failed have ended. An interrupt has precedence
            raise self._errors[min(self._errors, key=lambda index: (isinstance(self._errors[index], Exception), index))]
        return self._results
