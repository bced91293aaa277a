"""How commands end: one line and an exit code for errors, no traceback after Ctrl-C, no half-written files."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

import keye_kernels
from keye_kernels.cli import main
from keye_kernels.small import ASSETS, SMALL
from keye_kernels.tools import compile as checker
from keye_kernels.tools import inspect
from keye_kernels.tools.bench import report
from keye_kernels.tools.running import worker_pool
from keye_kernels.triton import launch_config

COMMANDS = {
    "demo": [],
    "generate": ["--model", str(SMALL), "hi"],
    "inspect": ["--video", str(ASSETS / "clip.mp4")],
    "verify": [],
    "doctor": [],
    "autotune": [],
    "bench": ["--load"],
}
GENERATE = ["generate", "--model", str(SMALL), "--max-new-tokens", "1"]
each_command = pytest.mark.parametrize("command", COMMANDS)


def fail(monkeypatch, command, error):
    def run(options):
        raise error

    monkeypatch.setattr(import_module(f"keye_kernels.tools.{command}"), "run", run)


@each_command
def test_an_unexpected_exception_prints_one_line_and_exits_with_1(command, monkeypatch, capsys):
    monkeypatch.delenv("KEYE_KERNELS_DEBUG", raising=False)
    for error in (KeyError("tokens"), RuntimeError("first line\nand dozens more"), ZeroDivisionError(), AssertionError("x")):
        fail(monkeypatch, command, error)
        assert main([command, *COMMANDS[command]]) == 1
        out, err = capsys.readouterr()
        assert err.startswith(f"keye-kernels {command}: unexpected {type(error).__name__}") and out == ""
        assert err.count("\n") == 1 and "KEYE_KERNELS_DEBUG=1" in err and "dozens" not in err


@each_command
def test_a_bad_input_prints_one_line_and_exits_with_2(command, monkeypatch, capsys):
    monkeypatch.delenv("KEYE_KERNELS_DEBUG", raising=False)
    errors = (ValueError("fps must\nbe above 0"), TypeError("fps must\nbe above 0"), OSError("fps must\nbe above 0"))
    for error in errors:
        fail(monkeypatch, command, error)
        assert main([command, *COMMANDS[command]]) == 2
        assert capsys.readouterr() == ("", f"keye-kernels {command}: fps must be above 0\n")


@pytest.mark.parametrize("error, code", [(KeyError("tokens"), 1), (ValueError("bad"), 2)])
def test_the_debug_variable_adds_the_traceback(error, code, monkeypatch, capsys):
    monkeypatch.setenv("KEYE_KERNELS_DEBUG", "1")
    fail(monkeypatch, "doctor", error)
    assert main(["doctor"]) == code
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@each_command
def test_ctrl_c_exits_with_130_and_prints_one_line(command, monkeypatch, capsys):
    fail(monkeypatch, command, KeyboardInterrupt())
    assert main([command, *COMMANDS[command]]) == 130
    assert capsys.readouterr() == ("", f"keye-kernels {command}: interrupted\n")


def test_ctrl_c_ends_the_compile_module_with_130(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checker, "worker_pool", interrupt)
    assert checker.main(["--target", "sm_90"]) == 130
    assert capsys.readouterr().err.endswith(": interrupted\n")


@pytest.mark.parametrize(
    "arguments",
    [["keye_kernels", "bench", "--counted", "--target", "none"], ["keye_kernels.tools.compile", "--target", "sm_90"]],
    ids=["counted", "compile"],
)
def test_ctrl_c_in_a_terminal_also_ends_the_worker_processes(arguments):
    """A terminal sends SIGINT to all processes of the group."""
    command = [sys.executable, "-W", "ignore", "-m", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    # The resource tracker of multiprocessing and the first worker
    while children.exists() and len(children.read_text().split()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(3)  # the worker imports torch
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err and out == ""


def test_workers_ignore_the_signal_of_ctrl_c():
    with worker_pool(1, "0") as pool:
        worker = pool.submit(os.getpid).result()
        time.sleep(0.5)  # it waits for the next call
        os.kill(worker, signal.SIGINT)
        time.sleep(0.5)
        assert pool.submit(os.getpid).result(timeout=60) == worker


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0 and capsys.readouterr().out == f"keye-kernels {keye_kernels.__version__}\n"


@pytest.mark.parametrize("device", ["mps", "xpu", "hpu", "meta", "nonsense", "", "é", "cuda:99"])
@pytest.mark.parametrize("command", [GENERATE, ["demo"], ["verify"]], ids=lambda command: command[0])
def test_a_device_that_cannot_be_used_is_named_in_one_line(command, device, monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if device == "mps" and torch.backends.mps.is_available() and command != ["verify"]:
        pytest.skip("this machine has an MPS device")
    question = ["hi"] if command is GENERATE else []
    assert main([*command, "--device", device, *question]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and len(err) < 200
    assert "device must" in err and repr(device) in err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--sample", "--temperature", "nan"], "temperature must be"),
        (["--sample", "--temperature", "inf"], "temperature must be"),
        (["--sample", "--temperature", "0"], "temperature must be above 0"),
        (["--sample", "--top-p", "nan"], "top_p must be"),
        (["--sample", "--top-p", "1.5"], "top_p must be"),
        (["--sample", "--top-k", "-1"], "top_k must be"),
        (["--sample", "--top-k", str(2**70)], "top_k must be"),
        (["--sample", "--seed", "-1"], "--seed must be from 0"),
        (["--sample", "--seed", str(2**63)], "--seed must be from 0"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["--max-new-tokens", str(2**70)], "max_new_tokens"),
        (["--prompt-lookup", "16"], "prompt_lookup must be an integer from 1 to 15"),
        (["--prompt-lookup", "4", "--sample"], "prompt_lookup must be None except for greedy decoding"),
        (["--min-pixels", "-1"], "min_pixels"),
        (["--video", str(ASSETS / "clip.mp4"), "--fps", "nan"], "fps must be"),
        (["--video", str(ASSETS / "clip.mp4"), "--fps", "-1"], "fps must be"),
        (["--image", "é.png"], "'é.png' does not exist"),
        (["--image", "\udcff.png"], r"'\udcff.png' does not exist"),
    ],
)
def test_options_out_of_range_are_named_in_one_line(options, message, capsys):
    assert main([*GENERATE, *options, "hi"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_a_question_that_is_not_valid_unicode_is_an_error_in_one_line(capsys):
    assert main([*GENERATE, "what is \udcff?"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and r"\udcff" in err and err.count("\n") == 1


def test_a_question_outside_of_ascii_is_answered(capsys):
    assert main([*GENERATE, "这是什么? é"]) == 0
    assert capsys.readouterr().err == ""


def test_ignored_sampling_options_give_a_warning(capsys):
    assert main([*GENERATE, "--temperature", "0.5", "--top-k", "2", "hi"]) == 0
    assert "warning: --temperature, --top-k ignored without --sample" in capsys.readouterr().err
    assert main([*GENERATE, "--sample", "--temperature", "0.5", "hi"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "options, message",
    [
        (["--context", "0"], "--context must be at least 1, got 0"),
        (["--plot", "plot.xyz"], "--plot must end in .png, .pdf or .svg, got plot.xyz"),
    ],
)
def test_inspect_rejects_options_before_it_reads_the_video(options, message, capsys):
    assert main(["inspect", "--video", "missing.mp4", *options]) == 2
    assert capsys.readouterr() == ("", f"keye-kernels inspect: {message}\n")


@pytest.fixture
def full_disk(monkeypatch):
    """Each write stores the first half of the text, then fails."""

    def write_text(path, text, **options):
        path.write_bytes(text[: len(text) // 2].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_text)


@pytest.mark.parametrize("existing", [None, "the earlier page"])
def test_a_full_disk_leaves_no_half_written_page(existing, full_disk, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "to_html", lambda *_: "<html>" + 1000 * "x")
    case = {"group": "rope", "name": "a", "stats": {"median": 1.0, "q1": 1.0, "q3": 1.0}}
    result, folder = tmp_path / "result.json", tmp_path / "out"
    result.write_bytes(json.dumps({"benchmarks": [case]}).encode())
    folder.mkdir()
    if existing:
        (folder / "index.html").write_bytes(existing.encode())
    assert main(["bench", "--report", str(folder), "--force", str(result)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    left = {path.name: path.read_text() for path in folder.iterdir()}
    assert left == ({"index.html": existing} if existing else {})


def test_a_full_disk_leaves_no_half_written_table(full_disk, tmp_path):
    with pytest.raises(OSError, match="No space left"):
        launch_config.write_atomically(tmp_path / "table.json", "{}")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_plot_leaves_no_half_written_image(tmp_path, monkeypatch):
    plot = tmp_path / "plot.png"
    plot.write_text("the earlier plot")

    def fail_halfway(inspection, path, context_length):
        Path(path).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(inspect, "plot_inspection", fail_halfway)
    options = argparse.Namespace(
        video=str(ASSETS / "clip.mp4"), edition="preview", fps=None, context=None, plot=str(plot), model=None
    )
    with pytest.raises(OSError, match="No space left"):
        inspect.run(options)
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"] and plot.read_text() == "the earlier plot"
