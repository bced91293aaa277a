"""The tables in the package: timed entries of registered kernels, in configs that the GPU can run."""

import json

import pytest

from keye_kernels.triton.device import Arch
from keye_kernels.triton.launch_config import NON_KEY_FIELDS, PACKAGE_TABLES, table_path
from keye_kernels.triton.registry import kernel_names, kernel_spec
from keye_kernels.triton.spec import TuningShape
from tests.helpers.shipped_configs import TARGETS, failures, shipped_variants

TABLES = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE_TABLES.glob("*.json"))]
EACH_TABLE = pytest.mark.parametrize("table", TABLES, ids=lambda table: table["device"])


@EACH_TABLE
def test_every_table_belongs_to_a_known_device(table):
    assert table.keys() == {"device", "triton", "kernels"} and table["device"] in TARGETS
    assert table_path(table["device"], PACKAGE_TABLES).is_file()


@EACH_TABLE
def test_every_entry_was_timed_and_has_the_fields_of_its_kernel(table):
    assert table["kernels"].keys() <= set(kernel_names())
    for kernel, entries in table["kernels"].items():
        spec = kernel_spec(kernel)
        for entry in entries:
            part = spec.part_of(entry)
            key = spec.config_key(TuningShape(kernel, part, 1, 64), "bf16")
            assert entry.keys() - set(NON_KEY_FIELDS) == key.keys() and entry["median_us"] > 0
            assert entry["config"].keys() == spec.heuristic(TuningShape(kernel, part, 1, 64), "bf16", _arch(table)).keys()


@EACH_TABLE
def test_attention_has_the_same_key_block_in_all_buckets(table):
    # Otherwise the order of a segment's sums would depend on the segments that it is packed with
    shared = kernel_spec("varlen_attention").fields_shared_by_buckets
    blocks = {}
    for entry in table["kernels"]["varlen_attention"]:
        blocks.setdefault(entry["head_dim"], set()).add(tuple(entry["config"][name] for name in shared))
    assert sorted(blocks) == [72, 128] and all(len(values) == 1 for values in blocks.values())


def test_every_config_of_the_tables_is_compiled_by_the_check():
    variants = shipped_variants()
    for table in TABLES:
        for kernel, entries in table["kernels"].items():
            compiled = [dict(variant.config) for variant in variants if variant.kernel == kernel]
            for entry in entries:
                assert any(entry["config"].items() <= config.items() for config in compiled), (kernel, entry)


def test_a_sample_compiles_without_failures():
    variants = [next(v for v in shipped_variants() if v.kernel == name) for name in ("rope", "position_embedding_2d")]
    assert failures(variants, workers=1) == []


def _arch(table):
    return Arch(TARGETS[table["device"]])
