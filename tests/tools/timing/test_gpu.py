"""`keye-kernels bench --gpu` without a GPU: the limit of time, what is saved and when, failures, all rows at small sizes."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from keye_kernels.cli import main
from keye_kernels.tools import bench
from keye_kernels.tools.bench.results import read_results
from keye_kernels.tools.time_box import TRUSTED_SECONDS, TimeBox
from keye_kernels.tools.timing import gpu, peers
from keye_kernels.tools.timing.clock import Measurement
from keye_kernels.tools.timing.gpu import run_rows, to_line
from keye_kernels.tools.timing.measuring import RequiredWork
from keye_kernels.tools.timing.profiling import GpuActivity
from keye_kernels.tools.timing.rows import Row, all_rows
from keye_kernels.tools.timing.stages import WITHOUT_GRAPHS, BenchmarkCase, without_graphs

CPU = torch.device("cpu")
WORK = RequiredWork(1024, 10**9, 10**12)
ACTIVITY = GpuActivity(0.004, 318, 320, [("gemm", 0.003, 108)])


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def stub_measure(call, device, repeat):
    """A call takes 5 ms times the value that it returns."""
    value = call().flatten()[0].item()
    return Measurement([0.005 * value, 0.004 * value, 0.006 * value], [0.001] * 3, ACTIVITY, 1 << 20)


def row(group, seconds=10.0, run=lambda: None, floor=None, **make):
    """A row; `run` is called when its case is built."""

    def case():
        run()
        return BenchmarkCase(WORK, make or {"ours": returning(1.0)}, floor)

    return Row(group, "1k", seconds, case)


def returning(value):
    return lambda: lambda: torch.full((2,), value)


def raising(error):
    def make():
        raise error

    return make


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "result.json"

    def run(rows, seconds=None, clock=None, measure=stub_measure):
        box = TimeBox(seconds, clock or Clock())
        result = run_rows(rows, box, path, torch.float32, CPU, measure)
        saved = json.loads(path.read_text())
        assert saved["benchmarks"] == json.loads(json.dumps(result.benchmarks)) and saved["left_out"] == result.left_out
        return result

    run.path = path
    return run


def test_rows_that_do_not_fit_are_left_out_by_name_and_shorter_ones_still_run(run):
    clock = Clock()

    def takes(seconds):
        return lambda: setattr(clock, "now", clock.now + seconds)

    rows = [row("a", 50, takes(50)), row("b", 60, takes(60)), row("c", 40, takes(40)), row("d", 20, takes(20))]
    result = run(rows, 100, clock)
    assert [entry["group"] for entry in result.benchmarks] == ["a", "c"]
    assert result.left_out == ["b 1k", "d 1k"] and result.seconds == 90


def test_a_row_that_took_longer_than_estimated_corrects_the_next_ones(run):
    clock = Clock()
    slow = row("a", 10, lambda: setattr(clock, "now", clock.now + 50))
    assert run([slow, row("b", 25), row("c", 20)], 100, clock).left_out == ["b 1k"]  # 25 * (20 + 50) / (20 + 10) > 50


def test_estimates_are_corrected_by_the_speed_of_the_machine():
    clock = Clock()
    box = TimeBox(100, clock)
    assert box.fits(100) and not box.fits(101)
    box.record(TRUSTED_SECONDS, 3 * TRUSTED_SECONDS)  # (20 + 60) / (20 + 20): twice as slow
    assert box.fits(50) and not box.fits(51)
    clock.now += 60
    assert box.elapsed == 60 and box.fits(20) and not box.fits(21)
    assert TimeBox(None, clock).fits(1e9)


def test_a_fast_machine_runs_more_rows():
    box = TimeBox(100, Clock())
    box.record(3 * TRUSTED_SECONDS, TRUSTED_SECONDS)
    assert box.fits(199) and not box.fits(201)


def test_each_implementation_is_saved_and_ctrl_c_keeps_it(run):
    def interrupt():
        saved = json.loads(run.path.read_text())
        assert [entry["params"]["impl"] for entry in saved["benchmarks"]] == ["first", "second"]
        raise KeyboardInterrupt

    rows = [row("a", first=returning(1.0), second=returning(1.0)), row("b", run=interrupt)]
    with pytest.raises(KeyboardInterrupt):
        run(rows)
    assert len(json.loads(run.path.read_text())["benchmarks"]) == 2


def test_a_failing_implementation_does_not_stop_the_others(run, capsys):
    bad = {"absent": raising(peers.Unavailable("absent: pip install it")), "broken": raising(RuntimeError("no memory\nmore"))}
    shapes = {"nan": returning(float("nan")), "wrong": returning(1.1), "right": returning(1.0)}
    result = run([row("a", ours=returning(1.0), **bad, **shapes), row("b", run=raising(ValueError("no case")))])
    assert [entry["params"]["impl"] for entry in result.benchmarks] == ["ours", "wrong", "right"]
    assert result.unavailable == {"a 1k, absent": "pip install it"}
    assert result.failed["a 1k, broken"] == "RuntimeError: no memory" and result.failed["b 1k, all"] == "ValueError: no case"
    assert "not finite" in result.failed["a 1k, nan"]
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert "WRONG: relative error 0.1, allowed 0.0001" in lines["wrong"] and "WRONG" not in lines["right"]


def test_the_right_result_is_that_of_the_first_implementation_that_runs():
    case = BenchmarkCase(WORK, {"absent": raising(peers.Unavailable("absent: no")), "second": returning(2.0)})
    assert gpu.expected_output(case).tolist() == [2, 2]
    case.expected = lambda: torch.zeros(1)
    assert gpu.expected_output(case).tolist() == [0]
    case.expected = raising(torch.OutOfMemoryError("too large"))
    assert gpu.expected_output(case).tolist() == [2, 2]
    with pytest.raises(RuntimeError, match="no implementation can run: Unavailable: absent: no"):
        gpu.expected_output(BenchmarkCase(WORK, {"absent": raising(peers.Unavailable("absent: no"))}))


def test_an_entry_has_wall_cpu_busy_launches_and_the_share_of_the_floor(run, capsys):
    result = run([row("vision", floor=returning(0.5), ours=returning(1.0))])
    floor, ours = result.benchmarks
    assert floor["params"]["impl"] == "floor" and floor["extra_info"]["share_of_floor"] is None
    assert ours["params"] == {"impl": "ours", "shape": "1k", "dtype": "float32"}
    assert ours["stats"] == pytest.approx({"median": 0.005, "q1": 0.0045, "q3": 0.0055, "rounds": 3})
    extra = ours["extra_info"]
    expected = {"gpu_busy_seconds": 0.004, "kernels": 318, "launches": 320, "share_of_floor": 0.5, "cpu_seconds": 0.001}
    assert expected.items() <= extra.items() and extra["slowest_kernels"] == [("gemm", 0.003, 108)]
    assert (extra["tflop_per_s"], extra["gb_per_s"]) == (200, 200) and extra["error"] == 0
    text = "wall 5 ms; CPU 1 ms; GPU busy 4 ms, 318 kernels, 320 launches; share of floor 50%; 200 TFLOP/s; 200 GB/s"
    assert to_line(ours).split(maxsplit=1)[1] == text and text in capsys.readouterr().out


def test_a_lost_device_ends_the_run_and_keeps_the_results(run, monkeypatch):
    def synchronize(device):
        raise torch.AcceleratorError("illegal memory access") if hasattr(torch, "AcceleratorError") else RuntimeError("illegal")

    monkeypatch.setattr(gpu, "machine_info", lambda: {"gpu": None})
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    rows = [row("a"), row("b", broken=raising(RuntimeError("illegal"))), row("c")]
    box = TimeBox(None, Clock())
    with pytest.raises(RuntimeError, match="the device stopped responding in b 1k"):
        run_rows(rows, box, run.path, torch.float32, torch.device("cuda"), stub_measure)
    assert [entry["group"] for entry in json.loads(run.path.read_text())["benchmarks"]] == ["a"]


def test_only_the_named_implementations_of_a_row_run(run):
    one = row("a", first=returning(1.0), second=returning(1.0))
    only = Row(one.group, one.shape, one.seconds, one.case, only=("second",))
    assert [entry["params"]["impl"] for entry in run([only]).benchmarks] == ["second"]
    assert run([only], seconds=1).left_out == ["a 1k: second"]


def test_all_rows_run_at_small_sizes(run, capsys):
    called = []

    def measure(call, device, repeat):
        called.append(call())
        return Measurement([0.001] * 3, [0.001] * 3, None, 0)

    rows = all_rows(True, torch.float32, CPU)
    result = run(rows, measure=measure)
    assert len(called) == len(result.benchmarks)
    assert not result.failed and not re.search("WRONG", capsys.readouterr().out)
    found = {(entry["group"], entry["params"]["impl"]) for entry in result.benchmarks}
    stages = {"floor", peers.OFFICIAL, peers.TRANSFORMERS, "keye_kernels"}
    assert found == {
        ("ceilings", "torch"),
        ("varlen_attention", "auto"),
        *(("PaddleOCR-VL", impl) for impl in (peers.STOCK, peers.PATCHED)),
        *((stage, impl) for stage in ("vision", "prefill", "decode") for impl in stages),
        *(("images", impl) for impl in (peers.TRANSFORMERS, peers.ONE_BY_ONE, "keye_kernels")),
    }


def test_the_rows_of_a_gpu_fit_into_the_default_time_and_start_with_the_most_important():
    rows = all_rows(False, torch.bfloat16, CPU)  # nothing is built
    names = [one.name for one in rows]
    assert names[:6] == [
        "ceilings copy",
        "ceilings read",
        "ceilings matmul",
        "varlen_attention 1_image_1024",
        "vision 1_image_1024",
        "prefill 1024_tokens",
    ]
    required = ["16_images_mixed", "64_frames_448"], [8192], [1, 8]
    assert {f"vision {name}" for name in required[0]} | {f"prefill {n}_tokens" for n in required[1]} <= set(names)
    assert {f"decode batch_{n}_after_1024" for n in required[2]} <= set(names)
    assert {"PaddleOCR-VL 1_image_1024", "PaddleOCR-VL 16_images_mixed"} <= set(names)
    optional = [("images", None), ("images", None), ("vision", (peers.COMPILED_TOWER,))]
    assert [(one.group, one.only) for one in rows[-3:]] == optional
    assert sum(one.seconds for one in rows[:-3]) <= 60 * bench.DEFAULT_MINUTES < 240


def test_calls_without_cuda_graphs_turn_them_off_for_one_call():
    model = SimpleNamespace(cuda_graphs=True, device=torch.device("cuda"))
    call = without_graphs(model, lambda: model.cuda_graphs)()
    assert call() is False and model.cuda_graphs is True
    model.device = CPU
    with pytest.raises(peers.Unavailable, match=WITHOUT_GRAPHS):
        without_graphs(model, call)()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_so(capsys, tmp_path):
    path = tmp_path / "r.json"
    assert main(["bench", "--gpu", "--out", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1 and not path.exists()
    reason = "TRITON_INTERPRET=1 is set" if peers.is_interpreting() else "torch finds none"
    assert f"bench --gpu needs a GPU, and {reason}" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "--minutes", "0"], "--minutes must be a positive number, got 0"),
        (["--gpu", "--minutes", "nan"], "--minutes must be a positive number, got nan"),
        (["--gpu", "--small", "--out", "{file}"], "{file} exists: choose another file with --out"),
        (["--counted", "--minutes", "1"], "--minutes needs --gpu"),
        (["--load", "--small"], "--small needs --gpu"),
        (["--report", "{file}", "--out", "x"], "--out needs --gpu"),
        (["--gpu", "a.json"], "result files need --report DIR"),
    ],
)
def test_wrong_options(arguments, message, capsys, tmp_path):
    file = tmp_path / "there.json"
    file.write_text("{}")
    assert main(["bench", *(argument.format(file=file) for argument in arguments)]) == 2
    assert message.format(file=file) in capsys.readouterr().err


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs the command with two rows and returns (exit code, path)."""

    def command(*rows):
        monkeypatch.setattr("keye_kernels.tools.timing.rows.all_rows", lambda *arguments: rows)
        return main(["bench", "--gpu", "--small", "--out", str(tmp_path / "new" / "r.json")]), tmp_path / "new" / "r.json"

    return command


def test_the_command_writes_a_file_that_the_report_draws(command, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    code, path = command(row("vision", floor=returning(1.0), official=returning(1.0), ours=returning(1.0)), row("late", 1e6))
    assert code == 0
    out = capsys.readouterr().out
    assert "3 measurements in" in out and "left out, because it did not fit into 3.75 minutes: late 1k" in out
    content = json.loads(path.read_text())
    for entry in content["benchmarks"]:
        entry["extra_info"] |= {"gpu_busy_seconds": 1e-5, "kernels": 3, "launches": 4}
    content["machine_info"]["gpu"] = {"name": "NVIDIA H100"}
    path.write_text(json.dumps(content))
    (result,), _ = read_results([str(path)])
    assert result.missing == ["late 1k was left out, to keep the limit of time"]
    assert main(["bench", "--report", str(tmp_path / "page"), str(path)]) == 0
    page = (tmp_path / "page" / "index.html").read_text()
    assert 'id="plot-busy"' in page and 'id="plot-floor"' in page and "late 1k was left out" in page
    assert all(f"<th>{title}</th>" in page for title in ("GPU busy, ms", "CPU, ms", "kernels", "launches", "share of floor"))
    assert "<td>3</td><td>4</td>" in page


def test_a_failure_makes_the_exit_code_1(command, capsys):
    code, _ = command(row("a", broken=raising(RuntimeError("no")), ours=returning(1.0)))
    assert code == 1 and "failed: a 1k, broken: RuntimeError: no" in capsys.readouterr().out


def test_ctrl_c_ends_with_130_and_names_the_file(command, capsys):
    code, path = command(row("a"), row("b", run=raising(KeyboardInterrupt())))
    captured = capsys.readouterr()
    assert code == 130 and f"the results so far are in {path}" in captured.err and "interrupted" in captured.err
    assert len(json.loads(path.read_text())["benchmarks"]) == 1
