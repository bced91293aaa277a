"""The tables in the package: every kernel on every target, ranked, and none that a chip cannot run."""

import json

import pytest

from keye_kernels.tools.autotune.kernels import SAME
from keye_kernels.tools.autotune.shapes import KERNELS
from keye_kernels.tools.autotune.shipped import TIMED_CARDS, failures, shipped_variants
from keye_kernels.tools.compile import CHIPS
from keye_kernels.triton import tiles

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


def test_every_table_is_a_targets_or_a_timed_cards_and_is_compiled_with_its_target():
    cards = {card: target for target, names in TIMED_CARDS.items() for card in names}
    paths = {tiles.table_path(name, tiles.PACKAGE_TABLES).name for name in (*CHIPS, *cards)}
    assert {path.name for path in tiles.PACKAGE_TABLES.glob("*.json")} == paths
    for card, target in cards.items():
        found = table(card)
        assert found["device"] == card and found["method"] == "timed" and found["kernels"].keys() <= set(KERNELS)
        timed = {tuple(sorted(e["config"].items())) for e in found["kernels"]["varlen_attention"]}
        assert timed <= {v.config for v in shipped_variants(target) if v.kernel == "varlen_attention"}


@pytest.mark.parametrize("target", [*CHIPS, *TIMED_CARDS["sm_90"]])
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
