"""Launch configs: the order of the tables, the choice of an entry, files that are not tables, and writing a table."""

import json
import logging
import subprocess
import sys
import time

import pytest
import torch

from keye_kernels.triton import launch_config as module
from keye_kernels.triton.device import MULTIPROCESSORS, Arch
from keye_kernels.triton.launch_config import clear_cache, launch_config, save_entries, table_folders, table_path
from keye_kernels.triton.registry import kernel_specs
from keye_kernels.triton.spec import TORCH_DTYPES

CPU = torch.device("cpu")
KEY = {"dtype": "bfloat16", "head_dim": 72, "tokens": 1024}
HEURISTIC = {"BLOCK_T": 4, "num_warps": 2}
ATTENTION_HEURISTIC = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2, "use_tma": False, "backend": "triton"}


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """The three folders of the look-up, empty, in order, and Triton 3.9."""
    folders = {
        "environment": tmp_path / "environment",
        "cache": tmp_path / "xdg" / "keye_kernels" / "tiles",
        "package": tmp_path / "package",
    }
    monkeypatch.setenv("KEYE_KERNELS_TILES", str(folders["environment"]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(module, "PACKAGE_TABLES", folders["package"])
    monkeypatch.setattr(module, "triton_version", lambda: "3.9.0")
    clear_cache()
    module.log_once.cache_clear()
    yield folders
    clear_cache()


def write_table(folder, entries, triton="3.9.0"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "cpu.json"
    path.write_text(json.dumps({"device": "cpu", "triton": triton, "kernels": {"rope": entries}}))
    return path


def entry(num_warps, **key):
    return {**KEY, **key, "config": {"num_warps": num_warps}, "median_us": 1.0}


def num_warps(**key):
    return launch_config("rope", CPU, KEY | key, HEURISTIC)["num_warps"]


def messages(caplog, level):
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def test_the_heuristic_is_used_without_a_table():
    assert launch_config("rope", CPU, KEY, HEURISTIC) == HEURISTIC


def test_folders_are_searched_in_order(folders, monkeypatch):
    assert table_folders() == list(folders.values())
    assert table_path("NVIDIA H100 80GB HBM3") == folders["environment"] / "NVIDIA_H100_80GB_HBM3.json"
    for number, name in zip((4, 8, 16), ["package", "cache", "environment"], strict=True):
        write_table(folders[name], [entry(number)])
        clear_cache()
        assert num_warps() == number
    monkeypatch.delenv("KEYE_KERNELS_TILES")
    assert table_folders() == [folders["cache"], folders["package"]]


def test_a_table_without_a_matching_entry_is_skipped(folders):
    write_table(folders["environment"], [entry(4, dtype="float32")])
    write_table(folders["cache"], [entry(8)])
    assert num_warps() == 8


def test_the_nearest_bucket_is_used(folders):
    entries = [entry(1, tokens=256), entry(4, tokens=4096), entry(8, tokens=1024, dtype="float16")]
    write_table(folders["environment"], entries)
    assert num_warps(tokens=64) == num_warps(tokens=1000) == 1
    assert num_warps(tokens=1100) == num_warps(tokens=4 * 4096) == 4
    assert num_warps(dtype="float16") == 8
    assert num_warps(dtype="float32") == HEURISTIC["num_warps"]


def test_a_bucket_is_used_up_to_a_ratio_of_four(folders):
    write_table(folders["environment"], [entry(4, tokens=256)])
    write_table(folders["cache"], [entry(8, tokens=4096)])
    heuristic = HEURISTIC["num_warps"]
    found = [num_warps(tokens=tokens) for tokens in (63, 64, 1024, 1025, 16385)]
    assert found == [heuristic, 4, 4, 8, heuristic]


def test_key_fields_that_are_not_buckets_must_match(folders):
    write_table(folders["environment"], [entry(4, head_dim=128)])
    assert num_warps(head_dim=128, tokens=300) == 4
    assert num_warps(head_dim=72) == num_warps(head_dim=256) == HEURISTIC["num_warps"]


def test_entries_with_other_key_fields_do_not_match(folders):
    without_head_dim = {name: value for name, value in entry(4).items() if name != "head_dim"}
    write_table(folders["environment"], [without_head_dim, entry(8, groups=4), entry(16, tokens="1024")])
    assert num_warps() == HEURISTIC["num_warps"]


def test_the_heuristic_fills_in_fields_that_an_entry_leaves_out(folders):
    write_table(folders["environment"], [entry(4)])
    assert launch_config("rope", CPU, KEY, HEURISTIC) == {"BLOCK_T": 4, "num_warps": 4}


@pytest.mark.parametrize(
    "config",
    [{"num_warps": "three"}, {"num_warps": True}, {"num_warps": 4, "FOO": 1}],
    ids=["type", "bool-for-int", "name"],
)
def test_an_entry_that_does_not_fit_the_kernel_is_ignored_with_a_warning(folders, caplog, config):
    write_table(folders["environment"], [{**KEY, "config": config, "median_us": 1.0}])
    assert launch_config("rope", CPU, KEY, HEURISTIC) == HEURISTIC
    (warning,) = messages(caplog, logging.WARNING)
    assert warning.startswith("ignoring a table entry of rope: ") and str(config) in warning


@pytest.mark.parametrize(
    ("name", "value"),
    [("BLOCK_T", value) for value in (-64, 0, 3, 32, 2**20)] + [("BLOCK_N", 8), ("BLOCK_M", 256), ("backend", "fastest")]
    + [("num_warps", value) for value in (0, 3, 32)] + [("num_stages", value) for value in (0, 9)],
)  # fmt: skip
def test_an_entry_with_a_value_that_no_kernel_takes_is_ignored_with_one_warning(folders, caplog, name, value):
    heuristic = {"BLOCK_T": 4, "num_warps": 2} if name == "BLOCK_T" else ATTENTION_HEURISTIC
    write_table(folders["environment"], [{**KEY, "config": {name: value}, "median_us": 1.0}])
    for tokens in (1024, 2048):
        assert launch_config("rope", CPU, KEY | {"tokens": tokens}, heuristic) == heuristic
    (warning,) = messages(caplog, logging.WARNING)
    assert f"{name!r}: {value!r}" in warning and f"invalid: {name};" in warning


def test_every_candidate_and_heuristic_of_every_kernel_is_valid():
    workload = {"images": [(1, 64), (4, 4096)], "frames": [(8, 1024)], "prompts": [(1, 2048)], "decode": [1, 64]}
    count = 0
    for spec in kernel_specs():
        for arch in map(Arch, MULTIPROCESSORS):
            for shape in spec.shapes(workload):
                for dtype in TORCH_DTYPES:
                    heuristic = spec.heuristic(shape, dtype, arch)
                    candidates = [{}, *spec.candidates(shape, arch, heuristic), *spec.refinements(heuristic)]
                    assert all(not module.invalid_fields({**heuristic, **config}, heuristic) for config in candidates)
                    count += len(candidates)
    assert count > 1000


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"kernels": {"rope": [{"dty',
        '{"kernels": 3}',
        '{"kernels": {"rope": 3}}',
        '{"triton": "3.9.0", "kernels": {"rope": [{"config": [1]}]}}',
        '{"triton": "3.9.0", "kernels": {"rope": [{"tokens": null, "config": {}}]}}',
        '{"triton": 3, "kernels": {}}',
        '{"kernels": {}}',
        "[]",
        "[" * 100_000,
        "\x00\xff",
    ],
    ids=lambda content: repr(content)[:20],
)
def test_a_broken_table_is_ignored_with_one_warning(content, folders, caplog):
    path = write_table(folders["environment"], [])
    path.write_bytes(content.encode("latin-1"))
    write_table(folders["cache"], [entry(4)])
    for tokens in (1024, 2048, 4096):
        assert num_warps(tokens=tokens) == 4
    (warning,) = messages(caplog, logging.WARNING)
    assert str(path) in warning


def test_a_table_of_another_triton_version_is_used_with_one_warning(folders, caplog):
    write_table(folders["environment"], [entry(4)], triton="3.4.0")
    assert num_warps(tokens=1024) == num_warps(tokens=2048) == 4
    (warning,) = messages(caplog, logging.WARNING)
    assert "3.4.0" in warning and "3.9.0" in warning


def test_the_table_in_use_is_logged_once(folders, caplog):
    caplog.set_level(logging.INFO)
    path = write_table(folders["cache"], [entry(4)])
    num_warps(tokens=1024), num_warps(tokens=2048)
    assert [str(path) in message for message in messages(caplog, logging.INFO)] == [True]


def test_the_heuristic_is_logged_once_with_the_path_of_a_table(folders, caplog):
    caplog.set_level(logging.INFO)
    num_warps(tokens=1024), num_warps(tokens=2048)
    path = str(folders["environment"] / "cpu.json")
    assert ["heuristic" in message and path in message for message in messages(caplog, logging.INFO)] == [True]


def test_tables_are_read_once(folders):
    path = write_table(folders["environment"], [entry(4)])
    assert num_warps() == 4
    path.unlink()
    assert num_warps() == num_warps(tokens=2048) == 4
    clear_cache()
    assert num_warps() == HEURISTIC["num_warps"]


def test_clear_cache_empties_the_caches_of_launchers():
    calls = []
    cached = module.cache_config(lambda tokens: calls.append(tokens))
    cached(3), cached(3)
    assert calls == [3]
    clear_cache()
    cached(3)
    assert calls == [3, 3]


def timed_entry(tokens=1024, **config):
    return {**KEY, "tokens": tokens, "config": config, "median_us": 2.5}


def test_saved_entries_are_used_at_once_and_replaced(folders):
    path = save_entries("cpu", "rope", [timed_entry(num_warps=1)])
    assert path == folders["environment"] / "cpu.json"
    assert num_warps() == 1
    save_entries("cpu", "rope", [timed_entry(16, num_warps=8), timed_entry(num_warps=16)])
    save_entries("cpu", "linear", [timed_entry(num_warps=4)])
    assert num_warps() == 16 and num_warps(tokens=16) == 8
    assert [saved["tokens"] for saved in json.loads(path.read_text())["kernels"]["rope"]] == [16, 1024]
    assert set(path.parent.iterdir()) == {path, path.with_suffix(".lock")}


def test_saved_tables_have_one_entry_per_line(tmp_path):
    entries = [timed_entry(num_warps=1, BLOCK_T=2), timed_entry(16, num_warps=1)]
    text = save_entries("cpu", "rope", entries, tmp_path / "elsewhere").read_text()
    assert json.loads(text) == {"device": "cpu", "triton": "3.9.0", "kernels": {"rope": entries[::-1]}}
    assert sum("median_us" in line for line in text.splitlines()) == 2 and text.endswith("\n")


def test_saving_drops_entries_of_another_triton_version(folders):
    write_table(folders["environment"], [entry(4, tokens=16)], triton="3.4.0")
    path = save_entries("cpu", "rope", [timed_entry(num_warps=1)])
    assert [saved["tokens"] for saved in json.loads(path.read_text())["kernels"]["rope"]] == [1024]


SAVE_THREE = """
import sys, time
from keye_kernels.triton import launch_config
process, folder, start = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
read = launch_config._read
launch_config._read = lambda path: (read(path), time.sleep(0.05))[0]  # another process may write between read and write
launch_config._read.cache_clear = read.cache_clear
time.sleep(max(0, start - time.time()))
for number in range(3):
    entry = {"tokens": 100 * process + number, "config": {"num_warps": 4}, "median_us": 1.0}
    launch_config.save_entries("cpu", "rope", [entry], folder)
"""


def test_processes_that_save_at_the_same_time_keep_each_others_entries(tmp_path):
    start = str(time.time() + 8)  # after the imports
    commands = [[sys.executable, "-c", SAVE_THREE, str(process), str(tmp_path), start] for process in range(4)]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait(timeout=120) for process in processes] == [0] * 4
    saved = json.loads((tmp_path / "cpu.json").read_text())["kernels"]["rope"]
    assert [entry["tokens"] for entry in saved] == sorted(100 * process + number for process in range(4) for number in range(3))


def test_a_failed_write_leaves_the_old_table(monkeypatch):
    path = save_entries("cpu", "rope", [timed_entry(num_warps=1)])
    before = path.read_text()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(module.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_entries("cpu", "rope", [timed_entry(num_warps=8)])
    assert path.read_text() == before
