"""Launch configs: the order of the tables, the choice of an entry, files that are not tables, and writing a table."""

import json
import logging

import pytest
import torch

from keye_kernels.triton import launch_config as module
from keye_kernels.triton.launch_config import clear_cache, launch_config, save_entries, table_folders, table_path

CPU = torch.device("cpu")
KEY = {"dtype": "bfloat16", "head_dim": 72, "tokens": 1024}
HEURISTIC = {"BLOCK_T": 4, "num_warps": 2}


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
    module._report.cache_clear()
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
    for number, name in enumerate(["package", "cache", "environment"], start=10):
        write_table(folders[name], [entry(number)])
        clear_cache()
        assert num_warps() == number
    monkeypatch.delenv("KEYE_KERNELS_TILES")
    assert table_folders() == [folders["cache"], folders["package"]]


def test_a_table_without_a_matching_entry_is_skipped(folders):
    write_table(folders["environment"], [entry(10, dtype="float32")])
    write_table(folders["cache"], [entry(11)])
    assert num_warps() == 11


def test_the_nearest_bucket_is_used(folders):
    entries = [entry(1, tokens=256), entry(2, tokens=4096), entry(3, tokens=1024, dtype="float16")]
    write_table(folders["environment"], entries)
    assert num_warps(tokens=64) == num_warps(tokens=1000) == 1
    assert num_warps(tokens=1100) == num_warps(tokens=4 * 4096) == 2
    assert num_warps(dtype="float16") == 3
    assert num_warps(dtype="float32") == HEURISTIC["num_warps"]


def test_a_bucket_is_used_up_to_a_ratio_of_four(folders):
    write_table(folders["environment"], [entry(10, tokens=256)])
    write_table(folders["cache"], [entry(11, tokens=4096)])
    heuristic = HEURISTIC["num_warps"]
    found = [num_warps(tokens=tokens) for tokens in (63, 64, 1024, 1025, 16385)]
    assert found == [heuristic, 10, 10, 11, heuristic]


def test_key_fields_that_are_not_buckets_must_match(folders):
    write_table(folders["environment"], [entry(10, head_dim=128)])
    assert num_warps(head_dim=128, tokens=300) == 10
    assert num_warps(head_dim=72) == num_warps(head_dim=256) == HEURISTIC["num_warps"]


def test_entries_with_other_key_fields_do_not_match(folders):
    without_head_dim = {name: value for name, value in entry(10).items() if name != "head_dim"}
    write_table(folders["environment"], [without_head_dim, entry(11, groups=4), entry(12, tokens="1024")])
    assert num_warps() == HEURISTIC["num_warps"]


def test_the_heuristic_fills_in_fields_that_an_entry_leaves_out(folders):
    write_table(folders["environment"], [entry(10)])
    assert launch_config("rope", CPU, KEY, HEURISTIC) == {"BLOCK_T": 4, "num_warps": 10}


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
    write_table(folders["cache"], [entry(10)])
    for tokens in (1024, 2048, 4096):
        assert num_warps(tokens=tokens) == 10
    (warning,) = messages(caplog, logging.WARNING)
    assert str(path) in warning


def test_a_table_of_another_triton_version_is_used_with_one_warning(folders, caplog):
    write_table(folders["environment"], [entry(10)], triton="3.4.0")
    assert num_warps(tokens=1024) == num_warps(tokens=2048) == 10
    (warning,) = messages(caplog, logging.WARNING)
    assert "3.4.0" in warning and "3.9.0" in warning


def test_the_table_in_use_is_logged_once(folders, caplog):
    caplog.set_level(logging.INFO)
    path = write_table(folders["cache"], [entry(10)])
    num_warps(tokens=1024), num_warps(tokens=2048)
    assert [str(path) in message for message in messages(caplog, logging.INFO)] == [True]


def test_the_heuristic_is_logged_once_with_the_path_of_a_table(folders, caplog):
    caplog.set_level(logging.INFO)
    num_warps(tokens=1024), num_warps(tokens=2048)
    path = str(folders["environment"] / "cpu.json")
    assert ["heuristic" in message and path in message for message in messages(caplog, logging.INFO)] == [True]


def test_tables_are_read_once(folders):
    path = write_table(folders["environment"], [entry(10)])
    assert num_warps() == 10
    path.unlink()
    assert num_warps() == num_warps(tokens=2048) == 10
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
    path = save_entries("cpu", "rope", [timed_entry(num_warps=5)])
    assert path == folders["environment"] / "cpu.json"
    assert num_warps() == 5
    save_entries("cpu", "rope", [timed_entry(16, num_warps=6), timed_entry(num_warps=7)])
    save_entries("cpu", "linear", [timed_entry(num_warps=8)])
    assert num_warps() == 7 and num_warps(tokens=16) == 6
    assert [saved["tokens"] for saved in json.loads(path.read_text())["kernels"]["rope"]] == [16, 1024]
    assert list(path.parent.iterdir()) == [path]


def test_saved_tables_have_one_entry_per_line(tmp_path):
    entries = [timed_entry(num_warps=5, BLOCK_T=2), timed_entry(16, num_warps=1)]
    text = save_entries("cpu", "rope", entries, tmp_path / "elsewhere").read_text()
    assert json.loads(text) == {"device": "cpu", "triton": "3.9.0", "kernels": {"rope": entries[::-1]}}
    assert sum("median_us" in line for line in text.splitlines()) == 2 and text.endswith("\n")


def test_saving_drops_entries_of_another_triton_version(folders):
    write_table(folders["environment"], [entry(10, tokens=16)], triton="3.4.0")
    path = save_entries("cpu", "rope", [timed_entry(num_warps=5)])
    assert [saved["tokens"] for saved in json.loads(path.read_text())["kernels"]["rope"]] == [1024]


def test_a_failed_write_leaves_the_old_table(monkeypatch):
    path = save_entries("cpu", "rope", [timed_entry(num_warps=5)])
    before = path.read_text()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(module.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_entries("cpu", "rope", [timed_entry(num_warps=6)])
    assert path.read_text() == before
