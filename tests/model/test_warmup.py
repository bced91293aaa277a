"""`warmup` compiles what the model launches later, and a second process finds all kernels in the cache.

No GPU is needed: a driver without a device makes Triton compile for an H100, and launches do nothing. tests/gpu runs the kernels.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import keye_kernels as kk
from keye_kernels.warm_up import WarmupReport
from tests.helpers.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[2]
# A new process warms up the model twice, then runs a request of these sizes. It prints the (compiled, cached) kernels of each.
START = """
import json, sys
import torch
from tests.helpers.compiling_driver import install

install()
from keye_kernels import warm_up
from keye_kernels.triton.launch import compile_steps
from keye_kernels.ops import implementation
from tests.helpers.tiny import prompt, tiny_model

implementation._require_triton = lambda *_: None  # CPU tensors: no kernel is launched
with torch.no_grad(), implementation.use_impl("triton"):
    model = tiny_model()
    def compile(*steps):
        return compile_steps(steps, lambda: None)
    images = warm_up._check_grids([(1, 4, 6)], 2)
    steps = warm_up._steps(model, images, [9], torch.float32)
    first, again = compile(*steps), compile(*steps)
    inputs = prompt([(1, 4, 6)])
    def whole_model():
        output = model(**inputs)
        model(output.logits[:, -1:, :].argmax(-1) * 0, cache=output.cache)
    print(json.dumps([first, again, compile(whole_model)]))
"""


def run_process(cache):
    env = {**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", "-c", START]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_second_process_finds_all_kernels_in_the_cache(tmp_path):
    first, again, request = run_process(tmp_path)
    compiled, cached = first
    # position embedding, rope and attention of tower and decoder, and the two matmuls of the projector
    assert compiled >= 7 and cached == 0
    assert again == [0, 0], "kernels in memory were compiled or loaded again"
    assert request == [0, 0], "the model launched a kernel that the warm-up had not compiled"
    kernels = sorted(tmp_path.rglob("*.cubin"))
    assert len(kernels) == compiled
    assert run_process(tmp_path) == [[0, compiled], [0, 0], [0, 0]]
    assert sorted(tmp_path.rglob("*.cubin")) == kernels


def test_the_report_says_that_the_reference_compiles_nothing():
    report = kk.warmup(tiny_model(), grids=[(1, 4, 4), [(1, 4, 4), (2, 2, 6)]], prompt_lengths=[5], progress=True)
    assert report == WarmupReport(0, 0, 0.0, "nothing to compile: no operator runs as a Triton kernel on cpu")


def test_the_report_says_that_the_interpreter_compiles_nothing():
    with kk.use_impl("triton"):
        report = kk.warmup(tiny_model(), grids=[(1, 4, 4)])
    assert report.compiled == 0 and "TRITON_INTERPRET=1" in report.note


def test_warmup_does_not_change_the_model():
    from keye_kernels.warm_up import _check_grids, _steps

    model = tiny_model()
    layers = len(model.model.layers), len(model.visual.layers)
    for step in _steps(model, _check_grids([(1, 4, 4)], 2), [5], torch.float32):
        step()
    assert (len(model.model.layers), len(model.visual.layers)) == layers == (2, 2)
    assert model.config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"grids": [(1, 3, 4)]}, r"grids must hold .*, got \(1, 3, 4\)"),
        ({"grids": [(4, 4)]}, r"grids must hold .*, got \(4, 4\)"),
        ({"grids": [[(1, 4, 4), (1, 0, 4)]]}, "grids must hold"),
        ({"grids": [()]}, "grids must hold"),
        ({"grids": ["image.jpg"]}, "grids must hold .*, got 'image.jpg'"),
        ({"grids": [None]}, "grids must hold"),
        ({"grids": [(1, 4.5, 4)]}, "grids must hold"),
        ({"prompt_lengths": [0]}, "prompt_lengths must hold token counts from 1 to 2047, got 0"),
        ({"prompt_lengths": [2048]}, "prompt_lengths must hold"),
        ({"pixel_dtype": "float16"}, "pixel_dtype must be 'float32' or 'uint8', got 'float16'"),
        ({"prompt_lengths": [7.5]}, "prompt_lengths must hold .*, got 7.5"),
    ],
    ids=str,
)
def test_invalid_sizes_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        kk.warmup(tiny_model(), **sizes)


@pytest.mark.parametrize("sizes", [{"grids": (1, 4, 4)}, {"grids": 5}, {"prompt_lengths": 5}], ids=str)
def test_sizes_must_be_lists(sizes):
    with pytest.raises(TypeError, match=f"{next(iter(sizes))} must be a list"):
        kk.warmup(tiny_model(), **sizes)


def test_other_models_are_rejected():
    with pytest.raises(TypeError, match=r"model must be a keye_kernels.Keye, got Linear"):
        kk.warmup(torch.nn.Linear(2, 2))
