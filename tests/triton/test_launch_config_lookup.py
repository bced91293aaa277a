"""The look-up of launch configs: every size in buckets, versions of Triton, folders without variables, and valid values."""

import logging
from pathlib import Path

import pytest
import torch

from keye_kernels.triton import launch_config as module
from keye_kernels.triton.launch_config import (
    BUCKETS,
    clear_cache,
    entry_key,
    invalid_fields,
    launch_config,
    save_entries,
    table_folders,
    table_path,
)

CPU = torch.device("cpu")
HEURISTIC = {"BLOCK_T": 4, "num_warps": 2}


@pytest.fixture(autouse=True)
def tables(tmp_path, monkeypatch):
    monkeypatch.setenv("KEYE_KERNELS_TILES", str(tmp_path / "tiles"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(module, "PACKAGE_TABLES", tmp_path / "package")
    clear_cache()
    module.log_once.cache_clear()
    yield tmp_path
    clear_cache()


def found(kernel="rope", **key):
    return launch_config(kernel, CPU, key, HEURISTIC)["num_warps"]


def entry(num_warps, **key):
    return {**key, "config": {"num_warps": num_warps}, "median_us": 1.0}


@pytest.mark.parametrize("size", BUCKETS)
def test_each_size_is_a_bucket(size):
    save_entries("cpu", "rope", [entry(8, dtype="float16", **{size: 256})])
    numbers = [found(dtype="float16", **{size: number}) for number in (63, 64, 200, 256, 1024, 1025)]
    assert numbers == [2, 8, 8, 8, 8, 2]


@pytest.mark.parametrize("size", ["head_dim", "channels", "columns"])
def test_other_sizes_must_match(size):
    save_entries("cpu", "rope", [entry(8, tokens=256, **{size: 64})])
    assert [found(tokens=256, **{size: number}) for number in (32, 64, 128)] == [2, 8, 2]


def test_buckets_are_the_sizes_of_the_kernels():
    assert set(BUCKETS) == {"max_seqlen", "patches", "rows", "tokens"}


def test_the_nearest_of_two_buckets_is_that_of_the_smallest_ratio():
    save_entries("cpu", "rope", [entry(1, tokens=256), entry(8, tokens=1024)])
    assert [found(tokens=number) for number in (500, 511, 513, 600)] == [1, 1, 8, 8]
    save_entries("cpu", "linear", [entry(4, tokens=0)])  # a size of 0 counts as 1
    assert [found("linear", tokens=number) for number in (0, 1, 4, 5)] == [4, 4, 4, 2]


def test_kernels_have_their_own_entries():
    save_entries("cpu", "rope", [entry(8, tokens=256)])
    assert (found("rope", tokens=256), found("linear", tokens=256)) == (8, 2)


@pytest.mark.parametrize(("written", "warns"), [("3.9.0", 0), ("3.9.1", 0), ("3.8.0", 1), ("4.9.0", 1), ("3.90.0", 1)])
def test_a_table_of_another_minor_version_warns(written, warns, monkeypatch, caplog):
    monkeypatch.setattr(module, "triton_version", lambda: written)
    save_entries("cpu", "rope", [entry(8, tokens=256)])
    monkeypatch.setattr(module, "triton_version", lambda: "3.9.0")
    with caplog.at_level(logging.WARNING):
        assert found(tokens=256) == 8
    assert len(caplog.records) == warns


def test_folders_without_variables(monkeypatch, tables):
    for value in (None, ""):
        for name in ("KEYE_KERNELS_TILES", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        monkeypatch.setenv("HOME", str(tables))
        assert table_folders() == [tables / ".cache" / "keye_kernels" / "tiles", tables / "package"]
    assert table_path("AMD Instinct MI300X/OAM (1)", "x") == Path("x") / "AMD_Instinct_MI300X_OAM_1_.json"


def test_the_package_has_its_tables_where_they_are_looked_up():
    source = Path(module.__file__).parent / "tables"
    assert (source / "NVIDIA_H200.json").is_file() and table_path("NVIDIA H200", source) == source / "NVIDIA_H200.json"


def test_measured_times_are_not_part_of_a_key():
    times = {"median_us": 1.0, "p20_us": 0.9, "p80_us": 1.1, "heuristic_us": 2.0}
    assert entry_key({"tokens": 3, "dtype": "float16", "config": {}, **times}) == {"tokens": 3, "dtype": "float16"}


def test_saving_keeps_entries_of_other_keys():
    save_entries("cpu", "rope", [entry(1, tokens=256, head_dim=72), entry(4, tokens=256, head_dim=128)])
    save_entries("cpu", "rope", [entry(8, tokens=256, head_dim=72)])
    assert (found(tokens=256, head_dim=72), found(tokens=256, head_dim=128)) == (8, 4)


MATMUL = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2, "use_tma": False, "backend": "triton"}
LARGEST = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 128}


@pytest.mark.parametrize("name", LARGEST)
def test_blocks_of_a_matmul_are_powers_of_two_in_their_range(name):
    for value, is_valid in ((8, False), (16, True), (LARGEST[name], True), (2 * LARGEST[name], False), (48, False), (64, True)):
        assert invalid_fields({name: value}, MATMUL) == ([] if is_valid else [name]), value


@pytest.mark.parametrize(("name", "largest"), [("BLOCK_T", 16), ("BLOCK_H", 16), ("BLOCK_C", 4096)])
def test_blocks_of_elementwise_kernels_may_be_small(name, largest):
    heuristic = {name: 4, "num_warps": 2}
    for value, is_valid in ((0, False), (1, True), (3, False), (largest, True), (2 * largest, False)):
        assert invalid_fields({name: value}, heuristic) == ([] if is_valid else [name]), value


def test_other_fields_of_a_config():
    valid = {"num_warps": (1, 2, 4, 8, 16), "num_stages": range(1, 9), "backend": ("triton", "torch"), "use_tma": (False, True)}
    for name, values in valid.items():
        assert not any(invalid_fields({name: value}, MATMUL) for value in values)
    wrong = {"num_warps": 6, "num_stages": 0, "backend": "cublas", "use_tma": 1, "BLOCK_T": 4}
    assert invalid_fields(wrong, MATMUL) == list(wrong) and invalid_fields({"num_stages": 9}, MATMUL) == ["num_stages"]


def test_look_ups_are_cached_by_every_field_of_the_key():
    save_entries(
        "cpu", "rope", [entry(1, tokens=16, dtype="a"), entry(4, tokens=16, dtype="b"), entry(8, tokens=4096, dtype="a")]
    )
    keys = [{"tokens": tokens, "dtype": dtype} for dtype in "ab" for tokens in (16, 4096)]
    assert [found(**key) for key in keys] == [1, 8, 4, 2] and [found(**key) for key in reversed(keys)] == [2, 4, 8, 1]
