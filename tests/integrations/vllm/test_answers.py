"""Compares stock vLLM with vLLM with the plugin. Takes about 8 minutes: vLLM is started four times.

Needs its own environment:
    tests/integrations/vllm/make_environment FOLDER && FOLDER/bin/python -m pytest tests/integrations/vllm -n 0
"""

import base64
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from keye_kernels.small import SMALL
from tests.helpers.random_checkpoint import write_random_checkpoint

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM: build an environment with tests/integrations/vllm/make_environment FOLDER", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[3]
ASSETS = SMALL.parent
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
STOCK = "vllm.model_executor.models"
OURS = "keye_kernels.integrations.vllm.models"
CLASSES = {
    "Keye": ("keye.KeyeForConditionalGeneration", "KeyeForConditionalGeneration"),
    "KeyeVL1_5": ("keye_vl1_5.KeyeVL1_5ForConditionalGeneration", "KeyeVL1_5ForConditionalGeneration"),
    "small": ("keye.KeyeForConditionalGeneration", "KeyeForConditionalGeneration"),
}
# float32 sums in a different order
LOGPROB_TOLERANCE = 1e-4
STARTUP_SECONDS = 900


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, **OFFLINE, **variables}


def answers(folders: dict[str, Path], output: Path, options: dict | None = None, **variables: str) -> dict[str, dict]:
    """Runs tests.integrations.vllm.answers on these checkpoints. Returns its results by name, and its output as "log"."""
    command = [
        sys.executable,
        "-m",
        "tests.integrations.vllm.answers",
        str(output),
        json.dumps(options or {}),
        *map(str, folders.values()),
    ]
    run = subprocess.run(command, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, check=False)
    log = run.stdout + run.stderr
    assert run.returncode == 0, log[-6000:]
    found = json.loads(output.read_text(encoding="utf-8"))
    return {name: found[str(folder)] for name, folder in folders.items()} | {"log": log}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    for model_type in ("Keye", "KeyeVL1_5"):
        write_random_checkpoint(root / model_type, model_type=model_type)
    shutil.copytree(SMALL, root / "small")
    for folder in root.iterdir():
        # Stock vLLM requires this table, although the model does not use it
        weights = {"visual.vision_model.embeddings.packing_position_embedding.weight": torch.zeros(32768, 144)}
        save_file(weights, folder / "unused.safetensors", metadata={"format": "pt"})
        index = folder / "model.safetensors.index.json"
        if index.exists():
            content = json.loads(index.read_text(encoding="utf-8"))
        else:
            with safe_open(folder / "model.safetensors", "pt") as file:
                content = {"metadata": {}, "weight_map": dict.fromkeys(file.keys(), "model.safetensors")}
        content["weight_map"] |= dict.fromkeys(weights, "unused.safetensors")
        index.write_text(json.dumps(content), encoding="utf-8")
    return {name: root / name for name in CLASSES}


@pytest.fixture(scope="module")
def stock(folders, tmp_path_factory):
    output = tmp_path_factory.mktemp("stock") / "answers.json"
    return answers(folders, output, VLLM_PLUGINS="none", VLLM_ENABLE_V1_MULTIPROCESSING="0")


@pytest.fixture(scope="module")
def plugged(folders, tmp_path_factory):
    output = tmp_path_factory.mktemp("plugged") / "answers.json"
    return answers(folders, output, VLLM_ENABLE_V1_MULTIPROCESSING="0")


@pytest.mark.parametrize("name", CLASSES)
def test_tokens_match_stock_vllm(stock, plugged, name):
    stock_class, our_class = CLASSES[name]
    assert stock[name]["classes"] == [f"{STOCK}.{stock_class}"]
    assert plugged[name]["classes"] == [f"{OURS}.{our_class}"]
    assert len(stock[name]["tokens"]) == 10
    assert plugged[name]["tokens"] == stock[name]["tokens"]
    for ours, theirs in zip(plugged[name]["logprobs"], stock[name]["logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=LOGPROB_TOLERANCE)


@pytest.mark.parametrize("name", CLASSES)
def test_answers_depend_on_the_image(stock, name):
    """Otherwise equal tokens would not test the tower: prompts 2 to 4 differ only in their image."""
    assert len({tuple(logprobs) for logprobs in stock[name]["logprobs"][2:5]}) == 3


@pytest.mark.parametrize("name", CLASSES)
def test_every_layer_runs_the_operators(folders, stock, plugged, name):
    layers = json.loads((folders[name] / "config.json").read_text(encoding="utf-8"))["vision_config"]["num_hidden_layers"]
    calls = plugged[name]["calls"]
    encodings = calls["patch_merge_projection"]
    assert encodings > 0
    assert calls == {
        "position_embedding_2d": encodings,
        "rope_2d": layers * encodings,
        "varlen_attention": layers * encodings,
        "patch_merge_projection": encodings,
    }
    assert stock[name]["calls"] == {}


def test_log_has_one_line_per_model(stock, plugged):
    lines = [line for line in plugged["log"].splitlines() if "keye_kernels in" in line]
    assert len(lines) == len(CLASSES)
    assert "position embedding, rope and attention of 2 vision layers, projector" in lines[0]
    assert "keye_kernels in" not in stock["log"]


def test_two_tensor_parallel_ranks_match_one(folders, plugged, tmp_path):
    chosen = {name: folders[name] for name in ("Keye", "KeyeVL1_5")}
    found = answers(
        chosen,
        tmp_path / "answers.json",
        {"tensor_parallel_size": 2},
        VLLM_CPU_OMP_THREADS_BIND="0|1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )
    for name in chosen:
        assert found[name]["classes"] == [f"{OURS}.{CLASSES[name][1]}"] * 2
        assert found[name]["tokens"] == plugged[name]["tokens"]


def test_lora_on_the_projector_runs_vllms_projector(folders, plugged, tmp_path):
    chosen = {name: folders[name] for name in ("Keye", "KeyeVL1_5")}
    options = {"enable_lora": True, "enable_tower_connector_lora": True, "max_lora_rank": 8}
    found = answers(chosen, tmp_path / "answers.json", options, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    for name in chosen:
        expected = {operator: n for operator, n in plugged[name]["calls"].items() if operator != "patch_merge_projection"}
        assert found[name]["calls"] == expected
        assert found[name]["tokens"] == plugged[name]["tokens"]


def test_environment_variable_keeps_the_stock_classes():
    program = (
        "from vllm import ModelRegistry; from vllm.plugins import load_general_plugins; load_general_plugins(); "
        "from transformers import CONFIG_MAPPING; "
        "print(ModelRegistry.models['KeyeForConditionalGeneration'].module_name, 'Keye' in CONFIG_MAPPING)"
    )
    for variables, expected in ({}, f"{OURS} True"), ({"KEYE_KERNELS_VLLM": "0"}, f"{STOCK}.keye False"):
        run = subprocess.run(
            [sys.executable, "-c", program], env=environment(**variables), capture_output=True, text=True, check=True
        )
        assert run.stdout.splitlines()[-1] == expected


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of vLLM's OpenAI server with the small model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(SMALL), "--port", str(port)]
    command += ["--served-model-name", "small", "--dtype", "float32", "--max-model-len", "2048", "--enforce-eager"]
    command += ["--kv-cache-memory-bytes", str(128 << 20), "--host", "127.0.0.1"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(60)


def wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail(f"the server did not start:\n{log.read_text()[-6000:]}")


def test_openai_server_answers_a_question_about_an_image(server):
    openai = pytest.importorskip("openai")
    image = base64.b64encode((ASSETS / "image.png").read_bytes()).decode()
    question, answer = json.loads((ASSETS / "questions.json").read_text(encoding="utf-8"))["image.png"][1]
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
        {"type": "text", "text": question},
    ]
    client = openai.OpenAI(base_url=server, api_key="none")
    reply = client.chat.completions.create(
        model="small", messages=[{"role": "user", "content": content}], temperature=0, max_tokens=16
    )
    assert reply.choices[0].message.content.strip() == answer == "three"
