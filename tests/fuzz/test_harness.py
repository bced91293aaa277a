"""`check` fails for what the fuzzers look for."""

import json
import socket
import subprocess
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from keye_kernels.model.config import check_number
from keye_kernels.processing.images import load_image

from . import harness
from .harness import DEFAULT_EXAMPLES, EXAMPLES, check

FOLDER = Path(__file__).parent


def test_errors_of_the_package_are_returned():
    assert isinstance(check(lambda: check_number("a", 3, 0, 1)), ValueError)
    assert check(lambda: 5) == 5


@pytest.mark.parametrize(
    "call",
    [lambda: {}["x"], lambda: int("x"), lambda: json.loads("{"), lambda: load_image("missing.png")],
    ids=["KeyError", "ValueError of Python", "ValueError of a library", "FileNotFoundError"],
)
def test_other_errors_are_reported(call):
    with pytest.raises(AssertionError, match="not an error of the package"):
        check(call)


def test_the_message_must_have_the_words():
    with pytest.raises(AssertionError, match="the message must name 'max_pixels'"):
        check(lambda: check_number("a", 3, 0, 1), words="max_pixels")


def connect():
    try:
        socket.create_connection(("127.0.0.1", 9), timeout=1)
    except OSError:
        return  # as a downloader would


@pytest.mark.parametrize(
    "call",
    [
        connect,
        lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).bind(("127.0.0.1", 0)),
        lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"", ("127.0.0.1", 9)),
        lambda: subprocess.run(["true"]),
        lambda: open("/proc/self/coredump_filter", "r+"),  # noqa: SIM115
    ],
    ids=["connect", "bind", "sendto", "program", "write"],
)
def test_sockets_programs_and_files_outside_are_reported(call):
    with pytest.raises(AssertionError, match="must not do this"):
        check(call)


def test_files_in_the_temporary_folder_are_allowed(tmp_path):
    assert check(lambda: (tmp_path / "x").write_text("a")) == 1


def test_a_hang_is_reported(monkeypatch):
    monkeypatch.setattr(harness, "MAX_SECONDS_PER_INPUT", 0.3)
    with pytest.raises(AssertionError, match=r"no answer within 0\.3 seconds"):
        check(lambda: time.sleep(60))


def test_memory_is_limited():
    with pytest.raises(AssertionError, match="MemoryError"):
        check(lambda: np.ones(2**33, np.uint8))


def test_the_inputs_add_up():
    modules = (import_module(f"tests.fuzz.{file.stem}") for file in FOLDER.glob("test_*.py"))
    tests = {f for m in modules for f in vars(m).values() if hasattr(f, "hypothesis") and f.__module__ == m.__name__}
    assert sum(test._hypothesis_internal_use_settings.max_examples for test in tests) == pytest.approx(EXAMPLES, abs=len(tests))
    assert DEFAULT_EXAMPLES == 2000
