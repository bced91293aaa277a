"""The benchmarks' own promises: no number without a correct answer, an honest baseline, complete records."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks import compare, peers, stages
from benchmarks.baseline import Baseline
from benchmarks.measuring import Work
from tests.helpers.tiny import prompt, tiny_model

ROOT = Path(__file__).resolve().parents[2]
FEATURES_TOLERANCE, LOGITS_TOLERANCE = 1e-5, 1e-4  # those of the golden data
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
    "tile_source",
    "versions",
}
CASES = """
import pytest, torch
from benchmarks.measuring import Work
from benchmarks.peers import Unavailable

SIZES = {"8": 8}

@pytest.mark.benchmark(group="double")
@pytest.mark.cases(impls=["right", "wrong", "nan", "short", "absent"], real=SIZES, smoke=SIZES)
def test_double(measure, impl, size, dtype, device):
    x = torch.arange(1.0, size + 1, device=device)

    def make():
        if impl == "absent":
            raise Unavailable("absent: pip install absent")
        outputs = {"right": 1, "wrong": 1.1, "nan": float("nan"), "short": 1}
        return lambda: (2 * x * outputs[impl])[impl == "short" :]

    measure(make, 2 * x, Work(size, 64, 16))
"""


# What the suite does on a GPU at the end of its collection, with another clock in place of CUDA's events
ON_GPU = """
import time
import pytest
from benchmarks import conftest as suite

def clock_of_the_gpu():
    return time.perf_counter()

suite.event_timer = clock_of_the_gpu

@pytest.hookimpl(hookwrapper=True)
def pytest_collection_modifyitems():
    before, suite.on_gpu = suite.on_gpu, lambda: True
    yield
    suite.on_gpu = before
"""


def run_suite(folder, **files):
    """The text and the JSON of a timed run of CASES."""
    files |= {"bench_double": CASES}
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "bench_double.py", "-p", "benchmarks.conftest", "-rs", "-p", "no:xdist"]
    # A worker of xdist would be taken for one, and not time
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment = inherited | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [*command, "--benchmark-json=out.json"], cwd=folder, env=environment, capture_output=True, text=True
    )
    return run.stdout + run.stderr, json.loads((folder / "out.json").read_text())


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return run_suite(tmp_path_factory.mktemp("suite"))


def test_a_gpu_is_timed_by_its_own_clock(suite, tmp_path):
    _, found = run_suite(tmp_path, conftest=ON_GPU)
    [case], [elsewhere] = found["benchmarks"], suite[1]["benchmarks"]
    assert case["options"]["timer"] == "clock_of_the_gpu" and elsewhere["options"]["timer"] == "perf_counter"
    assert case["group"] == "double"


def test_a_wrong_implementation_fails_and_gets_no_number(suite):
    text, found = suite
    assert "3 failed, 1 passed, 1 skipped" in text, text
    assert [case["params"]["impl"] for case in found["benchmarks"]] == ["right"]
    assert "deviates by" in text and "not timed" in text


def test_what_cannot_run_is_skipped_with_its_reason(suite):
    assert re.search(r"^SKIPPED \[1\] .*: absent: pip install absent$", suite[0], re.MULTILINE), suite[0]


def test_records_are_complete_and_documented(suite):
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can run what is refused here")
def test_every_peer_says_why_it_cannot_run_on_a_cpu():
    x, offsets, tables = torch.zeros(4, 2, 72), torch.tensor([0, 4], dtype=torch.int32), (torch.zeros(4, 72),) * 2
    for impl, make in {
        "flash_attn": lambda: peers.flash_attention(x, x, x, offsets, 4, False),
        "flash_attn: ": lambda: peers.flash_rope_2d(x, x, tables),
        "liger": lambda: peers.liger_rope_3d(x, x, x, x, tables, [12, 12, 12], 1e-6),
        "triton": lambda: peers.check_ours("triton", torch.device("cpu")),
        "compiled": lambda: peers.compiled(torch.neg, x, smoke=True),
    }.items():
        with pytest.raises(peers.Unavailable, match=f"^{impl.strip(': ')}: .{{20}}"):
            make()


def as_video(inputs):
    """The same prompt with its pictures as videos."""
    ids = inputs["input_ids"]
    return {
        "input_ids": torch.where(ids == 115, 116, ids),
        "pixel_values_videos": inputs["pixel_values"],
        "video_grid_thw": inputs["image_grid_thw"],
        "second_per_grid_ts": torch.full((len(inputs["image_grid_thw"]),), 0.5),
    }


@pytest.mark.parametrize("model_type", ["Keye", "KeyeVL1_5"])
@torch.no_grad()
def test_the_baseline_computes_what_keye_computes(model_type):
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
        following, _ = baseline.step(token, position, cache)
        expected = model(token, cache=output.cache).logits
        torch.testing.assert_close(following, expected, atol=LOGITS_TOLERANCE, rtol=1e-5)


@torch.no_grad()
def test_the_baseline_hides_padding():
    model, one = tiny_model(), prompt([(1, 4, 4)])
    ids = torch.nn.functional.pad(one["input_ids"], (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(one["input_ids"]), (3, 0))
    padded, _ = Baseline(model).forward(**{**one, "input_ids": ids, "attention_mask": mask})
    alone, _ = Baseline(model).forward(**one)
    torch.testing.assert_close(padded[:, 3:], alone, atol=LOGITS_TOLERANCE, rtol=1e-5)


def test_contestants_take_turns_and_ratios_are_taken_round_by_round():
    order = []

    def contestant(name):
        def call():
            order.append(name)
            return torch.ones(1)

        return lambda: call

    case = stages.Case(Work(1, 1), {name: contestant(name) for name in "AB"}, contestant("floor"))
    results = compare.race(case, rounds=3)
    assert order == ["A", "B", "floor"] * 4  # a first round checks and warms up
    assert all(len(r["seconds"]) == 3 for r in results.values())
    assert results["A"]["ratio_to_baseline"] == 1 and results["floor"]["share_of_floor"] == 1
    pairs = zip(results["A"]["seconds"], results["B"]["seconds"], strict=True)
    assert results["B"]["ratio_to_baseline"] == sorted(a / b for a, b in pairs)[1]


def test_a_wrong_contestant_is_not_timed():
    case = stages.Case(
        Work(1, 1), {"official": lambda: lambda: torch.ones(1), "wrong": lambda: lambda: torch.full((1,), 1.001)}
    )
    with pytest.raises(SystemExit, match="wrong deviates from official"):
        compare.race(case, rounds=3)


def test_spread_is_the_interquartile_range_over_the_median():
    assert compare.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)
