"""`keye-kernels inspect --model`: the facts of a checkpoint, from its configuration and the headers of its weights."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import keye_kernels as kk
from keye_kernels.cli import main
from keye_kernels.model.summary import CheckpointSummary
from keye_kernels.small import SMALL


@pytest.fixture
def checkpoint(tmp_path):
    folder = shutil.copytree(SMALL, tmp_path / "copy")

    def change(function, dtype=None):
        tensors = load_file(folder / "model.safetensors")
        function(tensors)
        save_file({name: x if dtype is None else x.to(dtype) for name, x in tensors.items()}, folder / "model.safetensors")

    return folder, change


def inspect(capsys, *arguments):
    code = main(["inspect", "--model", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, dict(re.split(r"\s{2,}", line, maxsplit=1) for line in out.splitlines() if not line.startswith(" ")), out, err


def test_the_small_model(capsys):
    code, rows, _, err = inspect(capsys, SMALL)
    model = kk.small_model()
    total = sum(parameter.numel() for parameter in model.parameters())
    assert code == 0 and err == ""
    assert rows["edition"] == "preview (model_type Keye)"
    assert rows["parameters"].startswith(f"{total / 1e6:.2f} million (vision tower")
    assert "3 layers, hidden size 128" in rows["text model"] and "4 layers, hidden size 144" in rows["vision tower"]
    assert "111 BF16" in rows["stored"] and "1 file, 3.9 MB" in rows["stored"]
    cache = model.new_cache(1, 100)
    per_token = sum(x.nbytes for x in (*cache.keys, *cache.values)) / 100
    assert f"key/value cache {per_token / 1e3:.1f} KB per token" in rows["memory"] and "for 4096 tokens" in rows["memory"]
    assert rows["other files"] == "complete" and rows["tensors"] == "as in config.json"


def test_the_numbers_of_parameters_add_up():
    summary = CheckpointSummary.read(SMALL)
    parts = dict(kk.small_model().named_parameters())
    assert sum(summary.parameters.values()) == sum(parameter.numel() for parameter in parts.values())
    projector = sum(parameter.numel() for name, parameter in parts.items() if name.startswith("mlp_AR."))
    assert summary.parameters["projector"] == projector


def test_wrong_tensors_are_listed_and_the_exit_code_is_1(checkpoint, capsys):
    folder, change = checkpoint

    def damage(tensors):
        del tensors["model.norm.weight"]
        tensors["extra"] = torch.zeros(2)
        tensors["mlp_AR.linear_1.bias"] = torch.zeros(3, dtype=torch.bfloat16)
        tensors["visual.vision_model.head.probe"] = torch.zeros(1)

    change(damage)
    code, rows, out, err = inspect(capsys, folder)
    assert code == 1 and err == "" and rows["tensors"] == "3 problems" and "1 not used for inference" in rows["stored"]
    for text in ("missing: model.norm.weight", "unexpected: extra", "wrong shape: mlp_AR.linear_1.bias is [3]"):
        assert f"  {text}" in out
    with pytest.raises(ValueError, match=r"missing: model.norm.weight\n  unexpected: extra\n  wrong shape"):
        kk.Keye.from_pretrained(folder)


def test_options_and_other_dtypes(checkpoint, capsys):
    folder, change = checkpoint
    change(lambda tensors: None, torch.float32)
    config = json.loads((folder / "config.json").read_text())
    for name in ("dtype", "torch_dtype"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink()
    _, rows, _, _ = inspect(capsys, folder, "--context", "1000")
    assert "weights 7.8 MB in float32" in rows["memory"] and "3.1 MB for 1000 tokens" in rows["memory"]
    assert rows["other files"] == "without generation_config.json" and "111 F32" in rows["stored"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "/none"], "config.json does not exist"),
        (["--model", str(SMALL), "--fps", "1"], "--fps needs --video"),
        (["--model", str(SMALL), "--plot", "a.png"], "--plot needs --video"),
        (["--model", str(SMALL), "--context", "0"], "--context must be at least 1"),
    ],
)
def test_errors(arguments, message, capsys):
    assert main(["inspect", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_no_weights_are_loaded(monkeypatch):
    monkeypatch.setattr("keye_kernels.model.checkpoint._read_chunks", None)
    monkeypatch.setattr("keye_kernels.model.keye.load_weights", None)
    assert CheckpointSummary.read(SMALL).dtype == torch.bfloat16
