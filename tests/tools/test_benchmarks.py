"""The benchmark suite: wrong outputs are not timed, the baseline computes what Keye computes, results are complete."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import compare
from benchmarks import conftest as suite_of_benchmarks
from keye_kernels.tools.timing import peers, stages
from keye_kernels.tools.timing.baseline import Baseline
from keye_kernels.tools.timing.measuring import RequiredWork
from keye_kernels.tools.timing.profiling import GpuActivity
from tests.helpers.tiny import prompt, tiny_model

ROOT = Path(__file__).resolve().parents[2]
FEATURES_TOLERANCE, LOGITS_TOLERANCE = 1e-5, 1e-4  # same as for the golden data
EXTRA_INFO = {
    "tokens",
    "bytes",
    "flops",
    "gb_per_s",
    "tflop_per_s",
    "roofline_share",
    "peak_memory_bytes",
    "error",
    "tolerance",
    "config_source",
    "versions",
}
CASES = """
import pytest, torch
from keye_kernels.tools.timing.measuring import RequiredWork
from keye_kernels.tools.timing.peers import Unavailable

SIZES = {"8": 8}

@pytest.mark.benchmark(group="double")
@pytest.mark.cases(impls=["right", "wrong", "nan", "short", "missing"], real=SIZES, smoke=SIZES)
def test_double(measure, impl, size, dtype, device):
    x = torch.arange(1.0, size + 1, device=device)

    def make():
        if impl == "missing":
            raise Unavailable("missing: pip install missing")
        outputs = {"right": 1, "wrong": 1.1, "nan": float("nan"), "short": 1}
        return lambda: (2 * x * outputs[impl])[impl == "short" :]

    measure(make, 2 * x, RequiredWork(size, 64, 16))
"""

# Collection as on a GPU, with a timer that needs no CUDA events
ON_GPU = """
import time
import pytest
from benchmarks import conftest as suite

def fake_event_timer():
    return time.perf_counter()

suite.event_timer = fake_event_timer

@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems():
    before, suite.on_gpu = suite.on_gpu, lambda: True
    yield
    suite.on_gpu = before
"""


def run_suite(folder, **files):
    """Runs CASES with timing. Returns the output and the JSON results."""
    pytest.importorskip("pytest_benchmark")
    files |= {"bench_double": CASES}
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "bench_double.py", "-p", "benchmarks.conftest", "-rs", "-p", "no:xdist"]
    # Without xdist's variables: the suite does not time in an xdist worker
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment = inherited | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([*command, "--benchmark-json=out.json"], cwd=folder, env=environment, capture_output=True, text=True)
    return run.stdout + run.stderr, json.loads((folder / "out.json").read_text())


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return run_suite(tmp_path_factory.mktemp("suite"))


def test_run_from_the_repository_root_works_without_pytest_benchmark():
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_position_embedding.py", "-c", "pyproject.toml"]
    options = ["-p", "no:benchmark", "-p", "no:xdist", "-k", "1_image_64 and reference"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    run = subprocess.run([*command, *options, "-v"], cwd=ROOT, env=inherited, capture_output=True, text=True)
    assert run.returncode == 0 and "1 passed" in run.stdout, run.stdout + run.stderr


def test_gpu_calls_are_timed_with_cuda_events(suite, tmp_path):
    _, found = run_suite(tmp_path, conftest=ON_GPU)
    [case], [on_cpu] = found["benchmarks"], suite[1]["benchmarks"]
    assert case["options"]["timer"] == "fake_event_timer" and on_cpu["options"]["timer"] == "perf_counter"
    assert case["group"] == "double"


def test_wrong_output_fails_and_is_not_timed(suite):
    text, found = suite
    assert "3 failed, 1 passed, 1 skipped" in text, text
    assert [case["params"]["impl"] for case in found["benchmarks"]] == ["right"]
    assert "the relative error is" in text and "not timed" in text


def test_unavailable_implementation_is_skipped_with_the_reason(suite):
    assert re.search(r"^SKIPPED \[1\] .*: missing: pip install missing$", suite[0], re.MULTILINE), suite[0]


def test_results_are_complete_and_documented(suite):
    (case,) = suite[1]["benchmarks"]
    assert case["group"] == "double" and case["params"] == {"dtype": "float32", "shape": "8", "impl": "right"}
    info = case["extra_info"]
    assert info.keys() == EXTRA_INFO
    assert info["versions"].keys() == {"torch", "triton", "python", "keye_kernels"}
    assert info["gb_per_s"] == pytest.approx(64 / case["stats"]["median"] / 1e9)
    assert info["peak_memory_bytes"] >= 32 and info["error"] == 0
    assert "gpu" in suite[1]["machine_info"]
    documented = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert all(f".{key}`" in documented for key in EXTRA_INFO)


@pytest.mark.skipif(torch.cuda.is_available(), reason="these peers can run on a GPU")
def test_unavailable_peer_names_the_reason():
    x, offsets, tables = torch.zeros(4, 2, 72), torch.tensor([0, 4], dtype=torch.int32), (torch.zeros(4, 72),) * 2
    for name, make in (
        (peers.FLASH_ATTN, lambda: peers.flash_attention(x, x, x, offsets, 4, False)),
        (peers.FLASH_ATTN, lambda: peers.flash_rope_2d(x, x, tables)),
        (peers.TORCH_FLASH, lambda: peers.torch_flash(x, x, x, offsets, 4, False)),
        (peers.LIGER, lambda: peers.liger_rope_3d(x, x, x, x, tables, [12, 12, 12], 1e-6)),
        (peers.LIGER, lambda: peers.liger_add_rms_norm(x, x, x, 1e-6)),
        (peers.LIGER, lambda: peers.liger_add_layer_norm(x, x, x, x, 1e-6)),
        (peers.LIGER, lambda: peers.liger_silu_mul(x, x)),
        ("triton", lambda: peers.check_ours("triton", torch.device("cpu"))),
        (peers.COMPILED, lambda: peers.compiled(torch.neg, x, is_timed=False)),
        (peers.COMPILED, lambda: peers.compiled(torch.neg, x, is_timed=True, loop_iterations=17)),
    ):
        with pytest.raises(peers.Unavailable, match=f"^{re.escape(name)}: .{{20}}"):
            make()


def as_video(inputs):
    """The same prompt, with videos instead of images."""
    ids = inputs["input_ids"]
    return {
        "input_ids": torch.where(ids == 115, 116, ids),
        "pixel_values_videos": inputs["pixel_values"],
        "video_grid_thw": inputs["image_grid_thw"],
        "second_per_grid_ts": torch.full((len(inputs["image_grid_thw"]),), 0.5),
    }


@pytest.mark.parametrize("model_type", ["Keye", "KeyeVL1_5"])
@torch.no_grad()
def test_baseline_matches_keye(model_type):
    model = tiny_model(model_type=model_type)
    baseline = Baseline(model)
    images, videos = prompt([(1, 4, 6), (1, 2, 4)]), as_video(prompt([(2, 4, 4), (3, 2, 2)]))
    features = baseline.get_image_features(images["pixel_values"], images["image_grid_thw"])
    expected = model.get_image_features(images["pixel_values"], images["image_grid_thw"])
    torch.testing.assert_close(features, expected, atol=FEATURES_TOLERANCE, rtol=1e-5)
    for inputs in (images, videos, prompt([])):
        logits, cache = baseline.forward(**inputs)
        output = model(**inputs)
        torch.testing.assert_close(logits, output.logits, atol=LOGITS_TOLERANCE, rtol=1e-5)
        token = logits[:, -1:].argmax(-1)
        position = inputs["input_ids"].shape[1] + int(output.rope_deltas)
        next_logits, _ = baseline.step(token, position, cache)
        expected = model(token, cache=output.cache).logits
        torch.testing.assert_close(next_logits, expected, atol=LOGITS_TOLERANCE, rtol=1e-5)


@torch.no_grad()
def test_baseline_ignores_padding():
    model, one = tiny_model(), prompt([(1, 4, 4)])
    ids = torch.nn.functional.pad(one["input_ids"], (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(one["input_ids"]), (3, 0))
    padded, _ = Baseline(model).forward(**{**one, "input_ids": ids, "attention_mask": mask})
    alone, _ = Baseline(model).forward(**one)
    torch.testing.assert_close(padded[:, 3:], alone, atol=LOGITS_TOLERANCE, rtol=1e-5)


def test_implementations_alternate_within_each_round():
    order = []

    def implementation(name):
        def call():
            order.append(name)
            return torch.ones(1)

        return lambda: call

    case = stages.BenchmarkCase(RequiredWork(1, 1), {name: implementation(name) for name in "AB"}, implementation("floor"))
    seconds, activities = compare.time_case(case, rounds=3)
    assert activities == dict.fromkeys(("A", "B", "floor"))
    assert order == ["A", "B", "floor"] * 4  # the first round is a check and a warm-up
    assert {name: len(rounds) for name, rounds in seconds.items()} == {"A": 3, "B": 3, "floor": 3}


def test_speedups_are_medians_of_the_ratios_of_single_rounds():
    seconds = {
        peers.OFFICIAL: [8.0, 8.0, 8.0],
        peers.TRANSFORMERS: [2.0, 6.0, 4.0],
        stages.KEYE_KERNELS: [1.0, 2.0, 4.0],
        "floor": [1.0, 1.0, 1.0],
    }
    results = compare.summarize(seconds)
    ours = results["implementations"][stages.KEYE_KERNELS]
    over = {peer: ratio["median"] for peer, ratio in ours["speedup_over"].items()}
    assert over == {peers.OFFICIAL: 4, peers.TRANSFORMERS: 2}
    assert ours["median"] == 2 and ours["share_of_floor"] == 0.5
    assert results["strongest_peer"] == peers.TRANSFORMERS
    last_line = compare.times_to_text(results).splitlines()[-1]
    assert last_line.startswith("  strongest peer: transformers + SDPA; speedup of keye_kernels over it: 2.00x")


ACTIVITY = GpuActivity(0.0015, 318, 41, [("gemm", 0.001, 108)])


def test_on_a_gpu_the_table_has_busy_time_kernels_and_launches():
    seconds = {peers.OFFICIAL: [0.008] * 3, stages.KEYE_KERNELS: [0.002] * 3, "floor": [0.001] * 3}
    results = compare.summarize(seconds, dict.fromkeys(seconds, ACTIVITY))
    assert results["implementations"][stages.KEYE_KERNELS]["gpu"] == asdict(ACTIVITY)
    head, _, ours, *_ = compare.times_to_text(results).splitlines()
    assert [name in head for name in ("GPU busy", "kernels", "launches", "share of floor")] == [True] * 4
    assert ours.split() == ["keye_kernels", "2.00", "ms", "0.0%", "1.50", "ms", "318", "41", "4.00x", "50.0%"]
    assert "GPU" not in compare.times_to_text(compare.summarize(seconds))


def test_calls_on_a_gpu_are_warmed_up_profiled_and_timed_by_the_clock_of_the_gpu(monkeypatch):
    calls, device = [], torch.device("cuda")
    monkeypatch.setattr(compare, "timed_call", lambda call, where: (0.5 if where == device else 0.0, 0.1))
    monkeypatch.setattr(compare, "profiled", lambda call, where: (call(), ACTIVITY)[1])
    case = stages.BenchmarkCase(RequiredWork(1, 1), {"A": lambda: lambda: calls.append(1) or torch.ones(1)})
    assert compare.time_case(case, 2, device=device) == ({"A": [0.5, 0.5]}, {"A": ACTIVITY})
    assert len(calls) == 1 + compare.WARM_UP_CALLS + 1


def test_half_precision_on_a_gpu_has_its_own_tolerance():
    make = {peers.OFFICIAL: lambda: lambda: torch.ones(1), "close": lambda: lambda: torch.full((1,), 1.04)}
    case = stages.BenchmarkCase(RequiredWork(1, 1), make)
    assert compare.checked_calls(case, torch.device("cuda")).keys() == make.keys()
    with pytest.raises(SystemExit):
        compare.checked_calls(case)


def test_stages_of_a_gpu_have_the_real_sizes(monkeypatch):
    built = []
    monkeypatch.setattr(compare, "build_model", lambda config, dtype, device: built.append((config, dtype, device.type)))
    for name in ("vision", "prefill", "decode", "first_token"):
        monkeypatch.setattr(stages, name, lambda *arguments: None)
    on_gpu = [name for stage in ("vision", "prefill", "decode") for name, _ in compare.cases(stage, False, torch.device("cuda"))]
    vision = ["1_image_1024", "16_images_mixed", "64_frames_448"]
    assert on_gpu == [*vision, "1024_tokens", "8192_tokens", "batch_1_after_1024", "batch_8_after_1024"]
    assert {(config.num_hidden_layers, *rest) for config, *rest in built[3:]} == {(36, torch.bfloat16, "cuda")}
    on_cpu = [name for stage in ("vision", "prefill", "decode") for name, _ in compare.cases(stage, False)]
    assert set(on_cpu) == set(on_gpu) - {"64_frames_448", "8192_tokens"}
    assert {(config.num_hidden_layers, *rest) for config, *rest in built[-2:]} == {(2, torch.float32, "cpu")}


def test_the_work_of_the_gpu_is_printed_after_the_tables_of_pytest_benchmark():
    lines = []
    extra = suite_of_benchmarks.gpu_fields(ACTIVITY, 0.001, 0.002)
    assert extra == {"gpu_busy_seconds": 0.0015, "kernels": 318, "launches": 41, "share_of_floor": 0.5}
    cases = [
        SimpleNamespace(name="test_vision[auto]", extra_info=extra, stats=SimpleNamespace(median=0.002)),
        SimpleNamespace(name="test_rope", extra_info={**extra, "share_of_floor": None}, stats=SimpleNamespace(median=0.002)),
        SimpleNamespace(name="on a CPU", extra_info={}, stats=SimpleNamespace(median=0.002)),
    ]
    reporter = SimpleNamespace(section=lambda text: lines.append(text), write_line=lines.append)
    for benchmarks in ([], cases[2:], cases):
        config = SimpleNamespace(_benchmarksession=SimpleNamespace(benchmarks=benchmarks))
        suite_of_benchmarks.pytest_terminal_summary(reporter, config)
    assert [line.split() for line in lines[1:]] == [
        ["test_vision[auto]", "2.000", "ms", "1.500", "ms", "318", "41", "50.0%"],
        ["test_rope", "2.000", "ms", "1.500", "ms", "318", "41"],
    ]
    assert suite_of_benchmarks.gpu_fields(None, 0.001, 0.002) == {"share_of_floor": 0.5}
    suite_of_benchmarks.pytest_terminal_summary(reporter, SimpleNamespace())  # without pytest-benchmark
    assert len(lines) == 3


def test_memory_is_compared_with_the_peer_that_needs_least():
    def allocate(mib):
        return lambda: lambda: torch.ones(mib << 20, dtype=torch.int8)[:1].clone()

    sizes = {peers.OFFICIAL: 8, peers.TRANSFORMERS: 4, stages.KEYE_KERNELS: 2}
    case = stages.BenchmarkCase(RequiredWork(1, 1), {name: allocate(mib) for name, mib in sizes.items()})
    results = compare.measure_memory(case)
    assert results["strongest_peer"] == peers.TRANSFORMERS
    assert compare.memory_to_text(results).splitlines()[-1].endswith("peak of keye_kernels / its peak: 0.50")


def test_compare_does_not_time_wrong_output():
    case = stages.BenchmarkCase(
        RequiredWork(1, 1),
        {peers.OFFICIAL: lambda: lambda: torch.ones(1), "wrong": lambda: lambda: torch.full((1,), 1.001)},
    )
    with pytest.raises(SystemExit, match=r"wrong differs from official \(eager\)"):
        compare.time_case(case, rounds=3)


def test_spread_is_the_interquartile_range_over_the_median():
    assert compare.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)


def test_a_call_on_a_gpu_takes_little_cpu_time(tmp_path):
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.cpu_overhead"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    assert len(re.findall(r"^(?:rope|varlen)\S* .* \d+\.\d$", run.stdout, re.MULTILINE)) == 5, run.stdout
