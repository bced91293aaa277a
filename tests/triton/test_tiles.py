import json
import logging
from functools import cache

import pytest
import torch

from keye_kernels.triton import tiles

CPU = torch.device("cpu")
KEY = {"dtype": "bfloat16", "head_dim": 72, "tokens": 1024}
HEURISTIC = {"BLOCK_T": 4, "num_warps": 2}


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """The three places of the look-up, empty, and Triton 3.9."""
    places = {
        "named": tmp_path / "named",
        "cache": tmp_path / "xdg" / "keye_kernels" / "tiles",
        "package": tmp_path / "package",
    }
    monkeypatch.setenv("KEYE_KERNELS_TILES", str(places["named"]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(tiles, "PACKAGE_TABLES", places["package"])
    monkeypatch.setattr(tiles, "triton_version", lambda: "3.9.0")
    tiles.clear_cache()
    yield places
    tiles.clear_cache()


def write(folder, entries, triton="3.9.0", name="cpu", **head):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    table = {"device": name, "triton": triton, "method": "timed", **head, "kernels": {"rope": entries}}
    path.write_text(json.dumps(table))
    return path


def entry(warps, **case):
    return {**KEY, **case, "config": {"num_warps": warps}, "median_us": 1.0}


def warps(**case):
    return tiles.tile("rope", CPU, KEY | case, HEURISTIC)["num_warps"]


def test_heuristic_serves_where_no_table_is():
    assert tiles.tile("rope", CPU, KEY, HEURISTIC) == HEURISTIC


def test_places_are_asked_in_order(folders):
    for number, place in enumerate(["package", "cache", "named"], start=10):
        write(folders[place], [entry(number)])
        tiles.clear_cache()
        assert warps() == number


def test_a_place_without_a_fitting_entry_passes_on(folders):
    write(folders["named"], [entry(10, dtype="float32")])
    write(folders["cache"], [entry(11)])
    assert warps() == 11


def test_text_must_match_and_integers_choose_the_nearest_bucket(folders):
    write(folders["named"], [entry(1, tokens=256), entry(2, tokens=4096), entry(3, tokens=1024, dtype="float16")])
    assert warps(tokens=64) == warps(tokens=1000) == 1
    assert warps(tokens=1100) == warps(tokens=4 * 4096) == 2
    assert warps(dtype="float16") == 3
    assert warps(dtype="float32") == HEURISTIC["num_warps"]


def test_a_size_that_no_entry_is_near_takes_the_next_table_or_the_heuristic(folders):
    write(folders["named"], [entry(10, tokens=256)])
    write(folders["cache"], [entry(11, tokens=4096)])
    usual = HEURISTIC["num_warps"]
    assert [warps(tokens=tokens) for tokens in (63, 64, 1024, 1025, 16385)] == [usual, 10, 10, 11, usual]


def test_sizes_that_are_no_buckets_must_match_exactly(folders):
    write(folders["named"], [entry(10, head_dim=128)])
    assert warps(head_dim=128, tokens=300) == 10
    assert warps(head_dim=72) == warps(head_dim=256) == HEURISTIC["num_warps"]


def test_entries_of_other_fields_do_not_fit(folders):
    without = {name: value for name, value in entry(10).items() if name != "head_dim"}
    write(folders["named"], [without, entry(11, groups=4), entry(12, tokens="1024")])
    assert warps() == HEURISTIC["num_warps"]


def test_what_an_entry_leaves_out_comes_from_the_heuristic(folders):
    write(folders["named"], [entry(10)])
    assert tiles.tile("rope", CPU, KEY, HEURISTIC) == {"BLOCK_T": 4, "num_warps": 10}


@pytest.mark.parametrize(
    "content",
    ["", '{"kernels": {"rope": [{"dty', '{"kernels": 3}', '{"triton": "3.9.0", "kernels": {"rope": [{"config": [1]}]}}',
     "[]", '{"triton": 3, "method": "timed", "kernels": {}}', '{"triton": "3.9.0", "kernels": {}}', '{"kernels": {"rope": 3}}',
     '{"triton": "3.9.0", "method": "timed", "kernels": {"rope": [{"tokens": null, "config": {}}]}}', "\x00\xff"],
)  # fmt: skip
def test_a_broken_table_is_ignored_with_one_warning(content, folders, caplog):
    path = write(folders["named"], [])
    path.write_bytes(content.encode("latin-1"))
    write(folders["cache"], [entry(10)])
    for tokens in (1024, 2048, 4096):
        assert warps(tokens=tokens) == 10
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and str(path) in warnings[0]


def test_a_table_of_another_triton_serves_and_warns_once(folders, caplog):
    write(folders["named"], [entry(10)], triton="3.4.0")
    assert warps(tokens=1024) == warps(tokens=2048) == 10
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "3.4.0" in warnings[0] and "3.9.0" in warnings[0]


def test_the_file_that_serves_is_logged_once(folders, caplog):
    caplog.set_level(logging.INFO)
    path = write(folders["cache"], [entry(10)])
    warps(tokens=1024), warps(tokens=2048)
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]


def test_the_file_that_would_serve_is_logged_once(folders, caplog):
    caplog.set_level(logging.INFO)
    warps(tokens=1024), warps(tokens=2048)
    assert [str(folders["named"] / "cpu.json") in record.getMessage() for record in caplog.records] == [True]


def test_tables_are_read_once(folders):
    path = write(folders["named"], [entry(10)])
    assert warps() == 10
    path.unlink()
    assert warps() == warps(tokens=2048) == 10
    tiles.clear_cache()
    assert warps() == HEURISTIC["num_warps"]


@pytest.fixture
def sm_90(monkeypatch):
    """The CPU passes for a GPU of 132 multiprocessors."""
    monkeypatch.setattr(tiles, "device_name", cache(lambda device: "NVIDIA H100"))
    monkeypatch.setattr(tiles, "target_name", cache(lambda device: "sm_90"))


RANKED = {"name": "sm_90", "method": "ranked, not timed"}


def test_timed_tables_of_the_device_go_before_ranked_ones_of_its_target(folders, sm_90):
    write(folders["named"], [entry(10)], **RANKED)
    assert warps() == 10
    tiles.clear_cache()
    write(folders["package"], [entry(11)], name="NVIDIA_H100")
    assert warps() == 11


def test_a_ranked_table_serves_its_own_triton_only_and_no_word_of_warning(folders, sm_90, caplog):
    write(folders["package"], [entry(10)], triton="3.4.0", **RANKED)
    assert warps() == HEURISTIC["num_warps"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(("processors", "serves"), [(132, True), (90, True), (78, False), (300, False)])
def test_a_ranked_table_serves_chips_of_about_its_size(folders, sm_90, monkeypatch, processors, serves):
    properties = type("Properties", (), {"multi_processor_count": processors})
    monkeypatch.setattr(tiles.torch.cuda, "get_device_properties", lambda device: properties)
    write(folders["package"], [entry(10)], processors=132, **RANKED)
    key = tuple(KEY.items())
    found = tiles._look_up.__wrapped__("rope", torch.device("cuda", 0), key)
    assert (found is not None) == serves


def test_what_is_no_gpu_reads_no_table_of_a_target(folders):
    write(folders["package"], [entry(10)], **RANKED)
    assert warps() == HEURISTIC["num_warps"]
    assert tiles.tables(CPU) == [folders[place] / "cpu.json" for place in ("named", "cache", "package")]


def saved(tokens=1024, **config):
    return {**KEY, "tokens": tokens, "config": config, "median_us": 2.5}


def test_saved_entries_are_found_and_replaced(folders):
    path = tiles.save("cpu", "rope", [saved(num_warps=5)])
    assert path == folders["named"] / "cpu.json"
    assert warps() == 5
    tiles.save("cpu", "rope", [saved(16, num_warps=6), saved(num_warps=7)])
    tiles.save("cpu", "linear", [saved(num_warps=8)])
    assert warps() == 7 and warps(tokens=16) == 6
    assert [found["tokens"] for found in json.loads(path.read_text())["kernels"]["rope"]] == [16, 1024]
    assert list(path.parent.iterdir()) == [path]


def test_saved_tables_have_one_entry_a_line(tmp_path):
    path = tiles.save("cpu", "rope", [saved(num_warps=5, BLOCK_T=2), saved(16, num_warps=1)], tmp_path / "elsewhere")
    text = path.read_text()
    table = json.loads(text)
    assert (table["device"], table["triton"], table["method"]) == ("cpu", "3.9.0", "timed")
    assert table["kernels"] == {"rope": [saved(16, num_warps=1), saved(num_warps=5, BLOCK_T=2)]}
    assert sum("median_us" in line for line in text.splitlines()) == 2 and text.endswith("\n")


def test_saving_drops_what_another_triton_measured_or_was_ranked(folders):
    for head in ({"triton": "3.4.0"}, {"method": "ranked, not timed"}):
        write(folders["named"], [entry(10, tokens=16)], **head)
        path = tiles.save("cpu", "rope", [saved(num_warps=5)])
        assert [found["tokens"] for found in json.loads(path.read_text())["kernels"]["rope"]] == [1024]


def test_a_table_that_cannot_be_replaced_stays_whole(monkeypatch):
    path = tiles.save("cpu", "rope", [saved(num_warps=5)])
    before = path.read_text()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(tiles.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tiles.save("cpu", "rope", [saved(num_warps=6)])
    assert path.read_text() == before


@pytest.mark.parametrize("config", [{"num_warps": "three"}, {"num_warps": 4, "FOO": 1}], ids=["type", "name"])
def test_an_entry_that_the_kernel_cannot_take_is_passed_over_with_a_warning(folders, caplog, config):
    write(folders["named"], [{**KEY, "config": config, "median_us": 1.0}])
    assert tiles.tile("rope", CPU, KEY, HEURISTIC) == HEURISTIC
    assert "is ignored" in caplog.text


def test_json_nested_without_end_is_ignored(folders):
    write(folders["named"], []).write_text("[" * 100_000)
    assert tiles.tile("rope", CPU, KEY, HEURISTIC) == HEURISTIC
