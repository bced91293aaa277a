"""Shapes, candidates, the choice between them, and the command line's refusals."""

import argparse
import json
from dataclasses import replace

import pytest

from keye_kernels.tools import autotune
from keye_kernels.tools.autotune import ranking
from keye_kernels.tools.autotune.candidates import candidates, refine
from keye_kernels.tools.autotune.choosing import Measured, choose
from keye_kernels.tools.autotune.kernels import heuristic, own_heuristic, specs, table_key
from keye_kernels.tools.autotune.shapes import KERNELS, SETS, Shape, load_shapes
from keye_kernels.tools.compile import CHIPS, Report

BUCKET = {"rope": "tokens", "position_embedding_2d": "patches", "varlen_attention": "max_seqlen", "linear": "rows"}


def parse(*arguments):
    parser = argparse.ArgumentParser()
    autotune.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize("name", SETS)
def test_sets_cover_every_kernel_and_repeat_no_shape(name):
    shapes = load_shapes(name)
    assert {shape.kernel for shape in shapes} == set(KERNELS) and len(set(shapes)) == len(shapes)
    others = [shape for shape in shapes if shape.kernel != "varlen_attention"]
    keys = [(shape.kernel, *table_key(shape, "bf16").items()) for shape in others]
    assert len(set(keys)) == len(keys)


def test_the_set_of_keye_8b_spans_its_use():
    shapes = load_shapes("keye-8b")
    reach = {
        kernel: [table_key(s, "bf16")[BUCKET.get(kernel, "rows")] for s in shapes if s.kernel == kernel]
        for kernel in KERNELS
    }
    assert min(reach["rope"]) == 1 and max(reach["rope"]) == 2**19  # one decoded token; 64 images of 5120 patches
    assert min(reach["varlen_attention"]) <= 256 and max(reach["varlen_attention"]) == 2**15
    assert min(reach["patch_merge"]) == 64 and max(reach["patch_merge"]) == 2**17


def test_a_file_gives_its_shapes(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"images": [[3, 400]], "decode": [5]}))
    shapes = load_shapes(str(path), ("rope", "patch_merge"))
    assert shapes == [
        Shape("rope", "text", 1, 5), Shape("rope", "vision", 3, 400),
        Shape("patch_merge", "block", 3, 100), Shape("patch_merge", "raster", 3, 100),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "content",
    ["", "{", "3", "{}", '{"pictures": [[1, 4]]}', '{"images": [1]}', '{"images": [[1, 6]]}', '{"images": [[0, 4]]}',
     '{"decode": [[1, 2]]}', '{"decode": [true]}', '{"prompts": 5}', '{"prompts": [[1, 2, 3]]}'],
)  # fmt: skip
def test_a_bad_shape_file_is_refused_with_the_form_it_should_have(content, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"mine\.json") as refused:
        load_shapes(str(path))
    assert "decode" in str(refused.value) or "keye-8b, small or a JSON file" in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        (["--kernel", "softmax"], "rope, position_embedding_2d, varlen_attention, linear, patch_merge"),
        (["--dry-run", "--target", "sm_99"], "sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, gfx942"),
        (["--dry-run"], "sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, gfx942"),
        (["--shapes", "large"], "keye-8b, small or a JSON file"),
        (["--dtype", "int8"], "bf16, fp16"),
        (["--target", "sm_90"], "--target goes with --dry-run"),
        (["--dry-run", "--target", "sm_90", "--resume"], "--resume goes on with timings"),
    ],
)
def test_unknown_names_are_refused_with_what_is_known(arguments, known):
    with pytest.raises(ValueError) as refused:
        autotune.run(parse(*arguments))
    assert known in str(refused.value)


def test_without_a_gpu_the_dry_run_is_offered(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="--dry-run --target sm_90"):
        autotune.run(parse())


@pytest.mark.parametrize("timed", [False, True], ids=["dry-run", "timed"])
@pytest.mark.parametrize("target", CHIPS)
def test_the_heuristic_is_the_first_candidate_and_none_comes_twice(target, timed):
    for shape in load_shapes("keye-8b"):
        tried = candidates(shape, "bf16", target, 132, timed)
        assert tried[0] == (heuristic if timed else own_heuristic)(shape, "bf16", target, 132)
        assert len({tuple(sorted(config.items())) for config in tried}) == len(tried) > 1
        assert timed or {config.get("path", "triton") for config in tried} == {"triton"}  # torch's cannot be ranked
        assert {frozenset(config) for config in tried} == {frozenset(tried[0])}


@pytest.mark.parametrize("timed", [False, True], ids=["dry-run", "timed"])
def test_no_candidate_for_amd_takes_statistics_in_the_product(timed):
    # a barrier there does not order the global stores that they go through
    for size in (16, 1024, 2**17):
        shape = Shape("patch_merge", "block", 1, size)
        assert {config["statistics"] for config in candidates(shape, "bf16", "gfx942", 304, timed)} == {"separate"}


@pytest.mark.parametrize("kernel", ["varlen_attention", "linear", "patch_merge"])
def test_descriptors_are_timed_where_the_chip_has_them(kernel):
    shape = Shape(kernel, "vision" if kernel == "varlen_attention" else "block", 1, 1025)
    for target in CHIPS:
        loads = {c.get("loads") for c in candidates(shape, "bf16", target, 132, timed=True)}
        both = {"pointers", "descriptors"} if target in ("sm_90", "sm_100", "sm_120") else {"pointers"}
        assert loads == both
        assert {c.get("loads") for c in candidates(shape, "bf16", target, 132, timed=False)} == {"pointers"}


def test_attention_of_short_segments_is_not_timed_with_descriptors():
    # a GPU's clock does not see what they cost the host
    tried = candidates(Shape("varlen_attention", "vision", 64, 1024), "bf16", "sm_90", 132, timed=True)
    assert {config["loads"] for config in tried} == {"pointers"}


@pytest.mark.parametrize("order", ["block", "raster"])
def test_the_projector_is_timed_on_every_path(order):
    shape = Shape("patch_merge", order, 1, 1024)
    first, *rest = candidates(shape, "bf16", "sm_90", 132, timed=True)
    tried = {path: [c for c in rest if c["path"] == path] for path in ("merged", "triton")}
    assert first["path"] == "cublas" and sum(map(len, tried.values())) == len(rest)
    assert candidates(shape, "bf16", "sm_80", 108, timed=True)[0]["path"] == "triton"
    # The merged ones are the plain product's, with its stages: no index comes before those loads
    plain = [
        c for c in candidates(replace(shape, kernel="linear"), "bf16", "sm_90", 132, True) if c["path"] != "cublas"
    ]
    assert {tuple(c[name] for name in plain[0] if name != "path") for c in tried["merged"]} == {
        tuple(c[name] for name in c if name != "path") for c in plain
    }
    assert {c["loads"] for c in tried["merged"]} == {"pointers", "descriptors"}
    assert {c["statistics"] for c in tried["merged"]} == {first["statistics"]}
    # The fused product, the slowest of them, with fewer
    fused = tried["triton"]
    assert len(fused) <= 8 and {c["statistics"] for c in fused} == {"separate", "fused"}
    assert {(c["loads"], c["num_stages"]) for c in fused} == {(first["loads"], first["num_stages"])}


@pytest.mark.parametrize("timed", [False, True], ids=["dry-run", "timed"])
def test_plain_products_go_to_torch_only_where_they_are_timed(timed):
    tried = candidates(Shape("linear", "block", 1, 1024), "bf16", "sm_90", 132, timed)
    assert {config["path"] for config in tried} == ({"triton", "cublas"} if timed else {"triton"})


@pytest.mark.parametrize("kernel", ["linear", "patch_merge"])
def test_what_must_compile_follows_the_path(kernel):
    tried = candidates(Shape(kernel, "raster", 1, 1024), "bf16", "sm_90", 132, timed=True)
    compiled = {config["path"]: specs(kernel, "raster", "bf16", "sm_90", config) for config in tried}
    assert compiled["cublas"] == [] and not any("gelu" in spec.label for spec in compiled["triton"])
    if kernel == "patch_merge":
        [spec] = compiled["merged"]
        assert [spec.signature[name] for name in ("IN", "OUT", "GELU")] == [4608, 4608, True]


@pytest.mark.parametrize("kernel", ["linear", "patch_merge"])
def test_the_fastest_products_are_tried_with_every_pipeline(kernel):
    shape = Shape(kernel, "block", 1, 1024)
    tried = candidates(shape, "bf16", "sm_90", 132, timed=True)
    assert len({(config.get("BLOCK_K"), config.get("num_stages")) for config in tried}) == 1
    fastest = [config for config in tried if config["path"] != "cublas"][:4]
    found = refine(shape, "sm_90", [{"path": "cublas"}, *fastest])
    assert {(config["BLOCK_K"], config["num_stages"]) for config in found} >= {(32, 5), (64, 2), (64, 4), (128, 2)}
    pipeline = ("BLOCK_K", "num_stages")
    tiles = [{name: value for name, value in config.items() if name not in pipeline} for config in found]
    assert all(any(tile.items() <= config.items() for tile in tiles) for config in fastest[:3])
    assert not any(tile.items() <= fastest[3].items() for tile in tiles)
    assert refine(Shape("rope", "text", 1, 1024), "sm_90", fastest) == []


def measured(bucket, costs, default="a", kernel="rope"):
    tiles = {"a": {"BLOCK_N": 128, "w": 1}, "b": {"BLOCK_N": 128, "w": 2}, "c": {"BLOCK_N": 64, "w": 1}}
    tiles = {name: {**tile, "path": "triton"} for name, tile in tiles.items()}
    tiles["torch"] = {**tiles["a"], "path": "torch"}
    return Measured(
        kernel, {"dtype": "x", "tokens": bucket}, tiles[default], [(tiles[name], cost) for name, cost in costs.items()]
    )


def chosen(shapes, margin=0.05):
    return {found.key["tokens"]: (config["BLOCK_N"], config["w"]) for found, config in choose(shapes, margin)}


def test_the_cheapest_tile_serves_unless_the_heuristics_is_as_good():
    assert chosen([measured(1, {"a": 100, "b": 94}), measured(2, {"a": 100, "b": 96})]) == {1: (128, 2), 2: (128, 1)}


def test_shapes_of_one_case_share_the_tile_with_the_smallest_geometric_mean():
    assert chosen([measured(1, {"a": 100, "b": 50}), measured(1, {"a": 100, "b": 300})]) == {1: (128, 1)}
    assert chosen([measured(1, {"a": 100, "b": 50}), measured(1, {"a": 100, "b": 150})]) == {1: (128, 2)}


def test_a_heuristic_that_was_rejected_gives_way_to_what_serves():
    assert chosen([measured(1, {"b": 1000})]) == {1: (128, 2)}
    assert chosen([measured(1, {})]) == {}


def test_torch_serves_attention_in_all_buckets_or_in_none():
    shapes = [measured(1, {"a": 100, "torch": 10}, kernel="varlen_attention"),
              measured(2, {"a": 100, "torch": 101}, kernel="varlen_attention"),
              measured(4, {"a": 100, "torch": 102}, kernel="varlen_attention")]  # fmt: skip
    assert {config["path"] for _, config in choose(shapes, 0.05)} == {"triton"}
    shapes[1].costs[1] = (shapes[1].costs[1][0], 90)
    assert {config["path"] for _, config in choose(shapes, 0.05)} == {"torch"}


def test_torchs_attention_is_timed_on_nvidia_only_and_needs_no_compiler():
    shape = Shape("varlen_attention", "vision", 1, 1024)
    for target, timed in (("sm_90", True), ("sm_90", False), ("gfx942", True)):
        paths = [c["path"] for c in candidates(shape, "bf16", target, 132, timed)]
        assert paths.count("torch") == (target == "sm_90" and timed)
    assert specs("varlen_attention", "vision", "bf16", "sm_90", {"path": "torch"}) == []


def test_attention_keeps_one_block_of_keys_in_all_buckets():
    shapes = [measured(1, {"a": 100, "c": 10}, kernel="varlen_attention"),
              measured(2, {"a": 100, "b": 80, "c": 99}, kernel="varlen_attention"),
              measured(4, {"a": 100, "b": 100, "c": 101}, kernel="varlen_attention")]  # fmt: skip
    assert chosen(shapes) == {1: (128, 1), 2: (128, 2), 4: (128, 1)}
    shapes[2].costs[2] = (shapes[2].costs[2][0], 50)
    assert chosen(shapes[::2]) == {1: (64, 1), 4: (64, 1)}
    assert (
        chosen([measured(1, {"a": 1}, kernel="varlen_attention"), measured(2, {"c": 1}, kernel="varlen_attention")])
        == {}
    )


def test_a_rank_counts_what_the_tile_pads_and_what_limits_it():
    report = Report("sm_90", "linear", "x", resident_blocks=1, instructions=1000, loop_instructions=100)
    config = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    # 100 rows are one row of tiles, 16 columns of them: a program a multiprocessor
    terms = ranking.rank(Shape("linear", "block", 1, 100), "sm_90", config, report)
    assert terms["tensor"] == 2 * 128 * 256 * 4608 / 4096 and terms["padding"] == 1.28 and terms["warps"] == 8
    assert terms["issue"] == (900 + 100 * 72) * 256 / 128
    assert terms["l2"] == (128 + 256) * 4608 * 2 / 48 and terms["clocks"] == terms["l2"] == terms["tensor"]
    # half the warps hide half of the latency
    halved = ranking.rank(Shape("linear", "block", 1, 100), "sm_90", config | {"num_warps": 4}, report)
    assert halved["clocks"] == 2 * terms["clocks"]


def test_a_rank_of_attention_counts_the_tiles_that_a_mask_leaves():
    report = Report("sm_90", "varlen_attention", "x", resident_blocks=2, instructions=0, loop_instructions=0)
    config = {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 2}
    vision = ranking.rank(Shape("varlen_attention", "vision", 1, 1024), "sm_90", config, report)
    assert vision["padding"] == 1.056  # 64 + 16 and 64 + 8 columns for twice 72
    text = ranking.rank(Shape("varlen_attention", "text", 1, 1024), "sm_90", config, report)
    assert text["padding"] == round(17 / 16 * 1024 / 1025, 3)  # the tiles on the diagonal count whole


def test_of_tiles_that_cost_the_same_the_first_candidate_is_chosen():
    """Whatever the order of a set: two runs write the same table."""
    tiles = [{"BLOCK_T": size, "num_warps": warps} for warps in (4, 8, 2) for size in (4, 2, 8, 1, 16)]
    for first in range(len(tiles)):
        order = tiles[first:] + tiles[:first]
        costs = [(config, 2.0 if config is tiles[0] else 1.0) for config in order]
        key = {"dtype": "bfloat16", "head_dim": 72, "tokens": 256}
        [(_, chosen)] = choose([Measured("rope", key, tiles[0], costs)], 0.25)
        assert chosen == next(config for config, cost in costs if cost == 1.0)
