"""How the commands end, and their worker processes."""

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

EXIT_UNEXPECTED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130
EXPECTED_ERRORS = (ValueError, TypeError, OSError, ImportError)


def exit_code(program: str, run: Callable[[], int | None]) -> int:
    """Runs a command and returns its exit code. An exception prints one line, and with KEYE_KERNELS_DEBUG=1 its traceback."""
    try:
        return run() or 0
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if os.environ.get("KEYE_KERNELS_DEBUG") == "1":
            traceback.print_exc()
        if isinstance(error, EXPECTED_ERRORS):
            print(f"{program}: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
            return EXIT_BAD_INPUT
        print(f"{program}: unexpected {summary(error)} (set KEYE_KERNELS_DEBUG=1 for the traceback)", file=sys.stderr)
        return EXIT_UNEXPECTED


def summary(error: BaseException) -> str:
    """One line of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@contextmanager
def worker_pool(workers: int | None, interpret: str) -> Iterator[ProcessPoolExecutor]:
    """Fresh processes: Triton decides at its first import whether it interprets (`interpret` "1") or compiles ("0")."""
    spawn = multiprocessing.get_context("spawn")
    # Ctrl-C reaches all processes of a terminal. If it ended the workers, the pool would wait for them forever
    ignore_interrupts = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(workers or os.cpu_count(), mp_context=spawn, initializer=ignore_interrupts)
    with patch.dict(os.environ, TRITON_INTERPRET=interpret):
        try:
            yield pool
        finally:
            # Do not wait for running calls or, after a second Ctrl-C, for the queue. The pool ends the calls of terminated
            # processes itself, and prints a traceback for those that are cancelled by then
            for process in list((pool._processes or {}).values()):
                process.terminate()
            pool.shutdown(wait=False)
