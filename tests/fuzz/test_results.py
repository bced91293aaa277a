"""Result files that commands read: benchmark results, counted work and tables of launch configs."""

import json
from pathlib import Path

import matplotlib.figure  # noqa: F401 - the first import makes its own cache folder
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keye_kernels.cli import main
from keye_kernels.triton import launch_config
from keye_kernels.triton.device import device_name

from .harness import check, fuzz
from .json_values import json_files

CASE = {
    "group": "rope_3d",
    "name": "bench_rope[triton]",
    "params": {"impl": "reference", "shape": "decoder 4096", "dtype": "bfloat16"},
    "stats": {"median": 1e-3, "q1": 9e-4, "q3": 1.1e-3},
    "extra_info": {
        "versions": {"torch": "2.9"},
        "tokens": 4096,
        "gb_per_s": 10.0,
        "roofline_share": 0.5,
        "peak_memory_bytes": 10**6,
    },
}
RESULT = {
    "machine_info": {"cpu": {"brand_raw": "x", "count": 2}, "gpu": {"name": "NVIDIA H100"}, "system": "Linux", "release": "6"},
    "benchmarks": [CASE, {**CASE, "params": {**CASE["params"], "impl": "triton"}}],
}
DEVICE = torch.device("cpu")
KEY = {"dtype": "float32", "head_dim": 128, "tokens": 4096}
HEURISTIC = {"num_warps": 4, "BLOCK_T": 16, "BLOCK_M": 64, "BLOCK_N": 64, "num_stages": 2, "backend": "triton"}
TABLE = {
    "device": device_name(DEVICE),
    "triton": launch_config.triton_version(),
    "kernels": {
        "rope": [
            {**KEY, "config": {"num_warps": 2, "BLOCK_M": 32}, "median_us": 9.1},
            {**KEY, "tokens": 128, "config": HEURISTIC},
        ]
    },
}


def run_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A command ends with 0, or with 2 and one line."""
    code = check(lambda: main(arguments))
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if "warning:" not in line]
    assert (code, lines) == (0, []) or (code == 2 and len(lines) == 1 and len(lines[0]) < 2000), (code, error)
    if code == 2:
        assert arguments[-1] in lines[0]


@fuzz(30)
@given(content=json_files(RESULT))
def test_report(content: bytes, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path_factory.mktemp("report")
    (folder / "result.json").write_bytes(content)
    run_command(["bench", "--force", "--report", str(folder), str(folder / "result.json")], capsys)


@fuzz(50)
@given(content=json_files(TABLE), kernel=st.sampled_from(["rope", "linear"]))
def test_launch_config_table(content: bytes, kernel: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("tables")
    launch_config.table_path(device_name(DEVICE), folder).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEYE_KERNELS_TILES", str(folder))
        launch_config.clear_cache()
        config = check(lambda: launch_config.launch_config(kernel, DEVICE, KEY, HEURISTIC))
    launch_config.clear_cache()
    assert isinstance(config, dict) and config.keys() == HEURISTIC.keys()
    assert not launch_config.invalid_fields(config, HEURISTIC)
    entry = {**KEY, "config": HEURISTIC, "median_us": 1.0}
    assert isinstance(check(lambda: launch_config.save_entries(device_name(DEVICE), "rope", [entry], folder)), Path)
    assert entry in json.loads(launch_config.table_path(device_name(DEVICE), folder).read_text())["kernels"]["rope"]
