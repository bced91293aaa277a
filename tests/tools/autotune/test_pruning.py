"""The pool of compiling processes ends on Ctrl-C."""

import contextlib
import os
import signal
import subprocess
import sys
import time

HANG_TIMEOUT_S = 300  # only ends a failed test: the tasks never end by themselves
# Tasks that never end and ignore SIGINT, as a compiler written in C does
BUSY = """
import signal, time
from keye_kernels.tools.autotune.pruning import compiler

def compile():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        time.sleep(60)

if __name__ == "__main__":
    with compiler(2) as pool:
        started = pool.executor.submit(time.sleep, 0)
        for _ in range(50):
            pool.executor.submit(compile)
        started.result()
        time.sleep(1)
        print("busy", flush=True)
        while True:
            time.sleep(60)
"""


def test_two_interrupts_end_the_pool(tmp_path):
    """A terminal sends SIGINT to all processes of the group."""
    script = tmp_path / "busy.py"
    script.write_text(BUSY)
    child = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        assert child.stdout.readline() == b"busy\n"
        os.killpg(child.pid, signal.SIGINT)
        time.sleep(0.5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGINT)
        assert child.wait(HANG_TIMEOUT_S) != 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
