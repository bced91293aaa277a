"""What every fuzzer checks: a call succeeds or raises an error of the package, in time, without network and without stray files.

A fuzzer is a test that hypothesis calls with many inputs. `pytest` runs 2,000 inputs in all, the same ones each time. With
KEYE_KERNELS_FUZZ_EXAMPLES=N, N in all, new ones each time; hypothesis prints how to repeat a failure.
"""

import dis
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from hypothesis import HealthCheck, settings

import keye_kernels

DEFAULT_EXAMPLES = 2000
MAX_SECONDS_PER_INPUT = 10
MAX_MESSAGE_CHARACTERS = 4000
PACKAGE = str(Path(keye_kernels.__file__).parent)
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Events of sys.addaudithook: sockets and name resolution, other programs, changes of files
FORBIDDEN = ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec")
CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.truncate", "shutil.rmtree")
EXAMPLES = int(os.environ.get("KEYE_KERNELS_FUZZ_EXAMPLES", DEFAULT_EXAMPLES))

_events: list[str] | None = None  # while a call is observed


def fuzz(examples: int) -> Callable[[Any], Any]:
    """Settings of one fuzzer, which gets this many of the 2,000 inputs."""
    return settings(
        max_examples=max(1, round(examples * EXAMPLES / DEFAULT_EXAMPLES)),
        derandomize=EXAMPLES == DEFAULT_EXAMPLES,
        database=None,
        deadline=None,  # `check` has a limit
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


def check(call: Callable[[], Any], *, expected: tuple[type[Exception], ...] = (ValueError, TypeError), words: str = "") -> Any:
    """Runs one call. Returns its result, or the error if it is one of the package with `words` in its message.

    Raises AssertionError for any other exception, a timeout, a socket, another program or a file outside of the temporary folder.
    """
    global _events
    events: list[str] = []
    caught: BaseException | None = None
    result = None
    previous = signal.signal(signal.SIGALRM, _interrupt_after(time.monotonic() - _seconds_without_cpu()))
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS_PER_INPUT)
    _events = events
    try:
        result = call()
    except Exception as error:
        caught = error
    except _Timeout as error:
        caught = error
    finally:
        _events = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    if events:
        raise AssertionError(f"the call must not do this: {events}") from caught
    if caught is None:
        return result
    text = str(caught)
    if not isinstance(caught, expected) or not _is_raised_by_package(caught.__traceback__):
        raise AssertionError(f"not an error of the package: {type(caught).__name__}: {text}") from caught
    if not text or len(text) > MAX_MESSAGE_CHARACTERS or words not in text:
        raise AssertionError(f"the message must name {words!r} and have at most {MAX_MESSAGE_CHARACTERS} characters: {text}")
    return caught


class _Timeout(BaseException):
    """Not an Exception, so that the package does not catch it."""


def _interrupt_after(start: float) -> Callable[[int, FrameType | None], None]:
    """A handler of SIGALRM. On a busy machine it allows more time: seconds in which the thread waits for a CPU do not count."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        left = MAX_SECONDS_PER_INPUT - (time.monotonic() - _seconds_without_cpu() - start)
        if left <= 0:
            raise _Timeout(f"no answer within {MAX_SECONDS_PER_INPUT} seconds")
        signal.setitimer(signal.ITIMER_REAL, max(left, 0.1))

    return interrupt


def _seconds_without_cpu() -> float:
    schedule = Path("/proc/thread-self/schedstat")
    return int(schedule.read_text().split()[1]) / 1e9 if schedule.exists() else 0.0


def _is_raised_by_package(traceback: TracebackType | None) -> bool:
    """Whether the exception comes from a raise statement of the package, not from a library that it calls."""
    if traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    code = traceback.tb_frame.f_code
    is_raise = code.co_code[traceback.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return is_raise and code.co_filename.startswith(PACKAGE)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _events is None:
        return
    if event in FORBIDDEN:
        _events.append(f"{event} {arguments[1:]}")
        raise PermissionError("refused by the fuzzer")
    is_write = event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[2] & WRITE_FLAGS
    if is_write or event in CHANGES:
        _note_change(event, arguments[0])


def _note_change(event: str, path: Any) -> None:
    path = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else str(path)
    is_allowed = os.path.abspath(path).startswith((tempfile.gettempdir(), os.devnull)) or "__pycache__" in path
    if not is_allowed and _events is not None:
        _events.append(f"{event} {path}")


sys.addaudithook(_audit)
