"""The tables in the package: every kernel on every target, ranked, and none that a chip cannot run."""

import json

import pytest

from keye_kernels.autotune.kernels import SAME
from keye_kernels.autotune.shapes import KERNELS
from keye_kernels.autotune.shipped import failures, shipped_variants
from keye_kernels.triton import tiles
from keye_kernels.triton.compile import CHIPS

SAMPLE = [("sm_90", "linear"), ("sm_89", "position_embedding_2d"), ("gfx942", "linear")]


def table(target):
    return json.loads(tiles.table_path(target, tiles.PACKAGE_TABLES).read_text())


@pytest.mark.parametrize("target", CHIPS)
def test_every_kernel_has_ranked_entries(target):
    found = table(target)
    assert found["device"] == target and found["method"] == "ranked, not timed" and found["cost"]
    assert found["kernels"].keys() == set(KERNELS) and all(found["kernels"].values())
    assert all(
        {"clocks", "shape", "heuristic"} <= entry["rank"].keys() for es in found["kernels"].values() for entry in es
    )
    assert tiles.to_text(found) == tiles.table_path(target, tiles.PACKAGE_TABLES).read_text()


@pytest.mark.parametrize("target", CHIPS)
def test_attention_has_one_block_of_keys_in_all_buckets(target):
    # else a segment's sums would add up in another order beside a longer neighbour
    blocks = {}
    for entry in table(target)["kernels"]["varlen_attention"]:
        blocks.setdefault(entry["head_dim"], set()).add(
            tuple(entry["config"].get(name) for name in SAME["varlen_attention"])
        )
    assert sorted(blocks) == [72, 128] and all(len(values) == 1 for values in blocks.values())


def test_a_sample_compiles_without_a_finding():
    variants = [next(v for v in shipped_variants(target) if v.kernel == kernel) for target, kernel in SAMPLE]
    assert failures(variants, workers=1) == []
