"""Launch-config tables of GPUs with the same chip: which GPUs these are, the order of the look-up, and what is logged."""

import json
import logging

import pytest
import torch

from keye_kernels.triton import device
from keye_kernels.triton import launch_config as module
from keye_kernels.triton.device import Arch, chip_and_model
from keye_kernels.triton.launch_config import PACKAGE_TABLES, clear_cache, launch_config, table_path, table_paths
from keye_kernels.triton.registry import kernel_specs
from keye_kernels.triton.spec import TuningShape

GPU = torch.device("cuda", 0)
H100, NVL, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H100 NVL", "NVIDIA H200"
KEY = {"dtype": "bfloat16", "head_dim": 72, "tokens": 1024}
HEURISTIC = {"BLOCK_T": 4, "num_warps": 2}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The folders of the look-up, empty, in order, on a machine with an H100."""
    folders = [tmp_path / name for name in ("environment", "cache", "package")]
    monkeypatch.setattr(module, "table_folders", lambda: folders)
    monkeypatch.setattr(module, "triton_version", lambda: "3.9.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: H100)
    device.device_name.cache_clear(), clear_cache(), module.log_once.cache_clear()
    yield folders
    device.device_name.cache_clear(), clear_cache()


def write(folder, name, number):
    folder.mkdir(parents=True, exist_ok=True)
    entries = [{**KEY, "config": {"num_warps": number}, "median_us": 1.0}]
    table_path(name, folder).write_text(json.dumps({"device": name, "triton": "3.9.0", "kernels": {"rope": entries}}))
    clear_cache()


def num_warps():
    return launch_config("rope", GPU, KEY, HEURISTIC)["num_warps"]


def test_gpus_with_the_same_chip():
    chips = {}
    for name in (H100, NVL, "NVIDIA H100 PCIe", H200, "NVIDIA H800", "NVIDIA GH200 480GB"):
        chips.setdefault(chip_and_model(name)[0], []).append(name)
    assert len(chips) == 1
    assert chip_and_model("NVIDIA A100-SXM4-80GB")[0] == chip_and_model("NVIDIA A100 80GB PCIe")[0] not in chips
    assert chip_and_model("NVIDIA H100 NVL")[1] == "H100"


@pytest.mark.parametrize("name", ["cpu", "NVIDIA H20", f"{H100} MIG 1g.10gb", "NVIDIA RTX 4090", "NVIDIA A10", "GH200"])
def test_gpus_without_siblings(name, folders):
    write(folders[0], H200, 8)
    write(folders[0], "NVIDIA A100-SXM4-40GB", 8)
    assert chip_and_model(name) is None
    assert table_paths(name) == [table_path(name, folder) for folder in folders]


def test_an_own_table_comes_first_then_the_same_model_then_the_folders_in_order(folders):
    tables = [
        (folders[2], H200),
        (folders[0], H200),
        (folders[2], NVL),
        (folders[0], NVL),
        (folders[2], H100),
        (folders[0], H100),
    ]
    for number, (folder, name) in zip((1, 4, 8, 16, 1, 8), tables, strict=True):
        write(folder, name, number)
        assert num_warps() == number, (folder, name)


def test_a_sibling_serves_the_sizes_that_an_own_table_does_not_have(folders):
    write(folders[0], H100, 16)
    write(folders[2], H200, 8)
    own = table_path(H100, folders[0])
    own.write_text(own.read_text().replace("1024", "16"))
    clear_cache()
    assert num_warps() == 8


def test_files_that_are_not_tables_are_not_read(folders, caplog):
    write(folders[0], "NVIDIA A100-SXM4-40GB", 8)
    for name in ("NVIDIA_H200.sweep.json", "NVIDIA_H200.1.2.tmp.json", "NVIDIA_H200.lock"):
        (folders[0] / name).write_text("no table")
    assert num_warps() == HEURISTIC["num_warps"] and caplog.records == []


def test_the_log_says_once_that_the_table_is_a_siblings(folders, caplog):
    caplog.set_level(logging.INFO)
    write(folders[2], H200, 8)
    num_warps(), launch_config("rope", GPU, KEY | {"tokens": 2048}, HEURISTIC)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.endswith("NVIDIA_H200.json, measured on another GPU with the same chip") and H100 in message
    write(folders[0], H100, 4)
    num_warps()
    assert caplog.records[-1].getMessage().endswith("NVIDIA_H100_80GB_HBM3.json")


def test_an_h100_uses_the_shipped_table_of_the_h200_and_heuristics_for_the_rest(folders):
    folders[2] = PACKAGE_TABLES
    timed = json.loads((PACKAGE_TABLES / "NVIDIA_H200.json").read_text())["kernels"]
    found = set()
    for spec in kernel_specs():
        for part in sorted({shape.part for shape in spec.shapes({"images": [[1, 1024]], "prompts": [[1, 1024]]})}):
            shape = TuningShape(spec.name, part, 1, 1024)
            key, heuristic = spec.config_key(shape, "bf16"), spec.heuristic(shape, "bf16", Arch("sm_90"))
            entries = [entry["config"] for entry in timed.get(spec.name, []) if all(entry[name] == key[name] for name in key)]
            assert launch_config(spec.name, GPU, key, heuristic) == (heuristic | entries[0] if entries else heuristic), shape
            found |= {(spec.name, part)} if entries else set()
    assert found >= {("rope", "vision"), ("varlen_attention", "vision"), ("varlen_attention", "text"), ("linear", "linear_2")}
