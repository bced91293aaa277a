"""Workloads, candidates, the choice between them, and the errors of the command line."""

import argparse
import json

import pytest

from keye_kernels.tools import autotune
from keye_kernels.tools.autotune.candidates import candidates, refinements
from keye_kernels.tools.autotune.choosing import MeasuredShape, choose
from keye_kernels.tools.autotune.workloads import WORKLOADS, load_shapes
from keye_kernels.triton.device import MULTIPROCESSORS, Arch
from keye_kernels.triton.registry import kernel_names, kernel_spec
from keye_kernels.triton.spec import TuningShape

# else rows
BUCKET = {
    "cache_attention": "tokens",
    "linear_few_rows": "block_rows",
    "rope": "tokens",
    "position_embedding_2d": "patches",
    "varlen_attention": "max_seqlen",
}
H100 = Arch("sm_90")


def parse(*arguments):
    parser = argparse.ArgumentParser()
    autotune.add_arguments(parser)
    return parser.parse_args(arguments)


def config_key(shape):
    return kernel_spec(shape.kernel).config_key(shape, "bf16")


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_cover_every_kernel_without_duplicate_shapes(name):
    shapes = load_shapes(name, kernel_names())
    assert {shape.kernel for shape in shapes} == set(kernel_names()) and len(set(shapes)) == len(shapes)
    others = [shape for shape in shapes if shape.kernel != "varlen_attention"]
    keys = [(shape.kernel, *config_key(shape).items()) for shape in others]
    assert len(set(keys)) == len(keys)


def test_the_workload_of_keye_8b_covers_small_and_large_sizes():
    sizes = {name: [] for name in kernel_names()}
    for shape in load_shapes("keye-8b", kernel_names()):
        sizes[shape.kernel].append(config_key(shape)[BUCKET.get(shape.kernel, "rows")])
    assert min(sizes["rope"]) == 1 and max(sizes["rope"]) == 2**19  # one decoded token; 64 images of 5120 patches
    assert min(sizes["varlen_attention"]) <= 256 and max(sizes["varlen_attention"]) == 2**15
    assert sorted(sizes["linear_few_rows"]) == sorted([1, 2, 4, 8, 16] * 5)
    for kernel in ("patch_merge_norm", "linear"):
        assert min(sizes[kernel]) == 64 and max(sizes[kernel]) == 2**17


def test_a_config_key_gives_the_part_of_its_shape():
    for shape in load_shapes("keye-8b", kernel_names()):
        assert kernel_spec(shape.kernel).part_of(config_key(shape)) == shape.part


def test_a_file_gives_its_shapes(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"images": [[3, 400]], "decode": [5]}))
    assert load_shapes(str(path), ("rope", "linear")) == [
        TuningShape("rope", "text", 1, 5),
        TuningShape("rope", "vision", 3, 400),
        TuningShape("linear", "linear_1", 3, 100),
        TuningShape("linear", "linear_2", 3, 100),
    ]


@pytest.mark.parametrize(
    "content",
    ["", "{", "3", "{}", '{"videos": [[1, 4]]}', '{"images": [1]}', '{"images": [[1, 6]]}', '{"images": [[0, 4]]}',
     '{"decode": [[1, 2]]}', '{"decode": [true]}', '{"prompts": 5}', '{"prompts": [[1, 2, 3]]}'],
)  # fmt: skip
def test_a_bad_workload_file_is_rejected_with_the_expected_form(content, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"mine\.json") as error:
        load_shapes(str(path), kernel_names())
    assert "decode" in str(error.value) or "keye-8b, small or a JSON file" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--kernel", "softmax"],
            "add_norm, cache_attention, linear, linear_few_rows, patch_merge_norm, position_embedding_2d, rope, silu_mul, "
            "varlen_attention",
        ),
        (["--dry-run", "--target", "sm_99"], "sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, gfx942"),
        (["--dry-run"], "sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, gfx942"),
        (["--shapes", "large"], "keye-8b, small or a JSON file"),
        (["--dtype", "int8"], "bf16, fp16"),
        (["--target", "sm_90"], "--target needs --dry-run"),
        (["--dry-run", "--target", "sm_90", "--resume"], "--resume needs a run that times"),
        (["--dry-run", "--target", "sm_90", "--save-dir", "x"], "--save-dir needs a run that times"),
    ],
)
def test_bad_options_are_rejected_with_the_valid_ones(arguments, message):
    with pytest.raises(ValueError) as error:
        autotune.run(parse(*arguments))
    assert message in str(error.value)


def test_without_a_gpu_the_dry_run_is_suggested(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="--dry-run --target sm_90"):
        autotune.run(parse())


def test_the_dry_run_lists_resources_and_libraries(capsys, tmp_path):
    path = tmp_path / "one.json"
    path.write_text(json.dumps({"images": [[1, 4]]}))
    autotune.run(parse("--dry-run", "--target", "sm_80", "--kernel", "position_embedding_2d", "--shapes", str(path)))
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == "compiled ahead of time, nothing was timed"
    shape = TuningShape("position_embedding_2d", "vision", 1, 4)
    assert len(lines) == len(candidates(shape, "bf16", Arch("sm_80")))
    assert all("registers, 0 bytes spilled, 0 bytes of shared memory" in line for line in lines)


@pytest.mark.parametrize("target", MULTIPROCESSORS)
def test_the_heuristic_is_the_first_of_the_candidates_which_are_distinct(target):
    arch = Arch(target)
    for shape in load_shapes("keye-8b", kernel_names()):
        tried = candidates(shape, "bf16", arch)
        assert tried[0] == kernel_spec(shape.kernel).heuristic(shape, "bf16", arch)
        assert len({tuple(sorted(config.items())) for config in tried}) == len(tried) > 1
        assert {frozenset(config) for config in tried} == {frozenset(tried[0])}


@pytest.mark.parametrize(("kernel", "part"), [("varlen_attention", "vision"), ("linear", "linear_1")])
def test_tma_is_tried_where_the_gpu_has_it(kernel, part):
    shape = TuningShape(kernel, part, 1, 1025)
    for target in MULTIPROCESSORS:
        tried = {config["use_tma"] for config in candidates(shape, "bf16", Arch(target))}
        assert tried == ({False, True} if target in ("sm_90", "sm_100", "sm_120") else {False})


def test_tma_is_not_tried_for_attention_of_short_segments():
    # GPU timings do not contain the CPU time that descriptors take
    tried = candidates(TuningShape("varlen_attention", "vision", 64, 1024), "bf16", H100)
    assert {config["use_tma"] for config in tried} == {False}


def test_libraries_are_tried_where_they_exist_and_need_no_compilation():
    vision, linear = TuningShape("varlen_attention", "vision", 1, 1024), TuningShape("linear", "linear_1", 1, 1024)
    for shape, target, has_library in (
        (vision, "sm_90", True),
        (vision, "gfx942", False),
        (linear, "sm_90", True),
        (linear, "gfx942", True),
    ):
        tried = candidates(shape, "bf16", Arch(target))
        assert {config["backend"] for config in tried} == ({"triton", "torch"} if has_library else {"triton"})
        for config in tried:
            variants = kernel_spec(shape.kernel).variants(shape.part, "bf16", Arch(target), config)
            assert bool(variants) == (config["backend"] == "triton")


def test_configs_that_exceed_shared_memory_are_dropped():
    fits = [{"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}]
    configs = [{**config, "use_tma": False, "backend": "triton"} for config in fits]
    shape = TuningShape("linear", "linear_1", 1, 1024)
    stages = {target: {c["num_stages"] for c in refinements(shape, Arch(target), configs) if c["BLOCK_K"] == 128}
              for target in ("sm_86", "sm_90")}  # fmt: skip
    assert stages == {"sm_86": {2, 3}, "sm_90": {2, 3, 4, 5}}  # 128 x 128 x 2 bytes per stage, of 99 and 227 KB


def test_the_fastest_linear_configs_are_refined():
    shape = TuningShape("linear", "linear_2", 1, 1024)
    tried = candidates(shape, "bf16", H100)
    assert len({(config["BLOCK_K"], config["num_stages"]) for config in tried}) == 1
    own = [config for config in tried if config["backend"] == "triton"][:4]
    library = next(config for config in tried if config["backend"] == "torch")
    found = refinements(shape, H100, [library, *own])
    assert {(config["BLOCK_K"], config["num_stages"]) for config in found} >= {(32, 5), (64, 2), (64, 4), (128, 2)}
    rest = [{name: value for name, value in c.items() if name not in ("BLOCK_K", "num_stages")} for c in found]
    assert all(any(part.items() <= config.items() for part in rest) for config in own[:3])
    assert not any(part.items() <= own[3].items() for part in rest)
    assert refinements(TuningShape("rope", "text", 1, 1024), H100, own) == []


def measured(bucket, times, heuristic="a", kernel="rope"):
    configs = {"a": {"BLOCK_N": 128, "w": 1}, "b": {"BLOCK_N": 128, "w": 2}, "c": {"BLOCK_N": 64, "w": 1}}
    configs = {name: {**config, "backend": "triton"} for name, config in configs.items()}
    configs["torch"] = {**configs["a"], "backend": "torch"}
    key = {"dtype": "x", "tokens": bucket}
    return MeasuredShape(kernel, key, configs[heuristic], [(configs[name], time) for name, time in times.items()])


def chosen(shapes, margin=0.05):
    return {found.key["tokens"]: (config["BLOCK_N"], config["w"]) for found, config in choose(shapes, margin)}


def test_the_fastest_config_is_chosen_unless_the_heuristic_is_as_fast():
    assert chosen([measured(1, {"a": 100, "b": 94}), measured(2, {"a": 100, "b": 96})]) == {1: (128, 2), 2: (128, 1)}


def test_shapes_with_the_same_key_share_the_config_with_the_smallest_geometric_mean():
    assert chosen([measured(1, {"a": 100, "b": 50}), measured(1, {"a": 100, "b": 300})]) == {1: (128, 1)}
    assert chosen([measured(1, {"a": 100, "b": 50}), measured(1, {"a": 100, "b": 150})]) == {1: (128, 2)}


def test_a_rejected_heuristic_is_replaced_by_a_working_config():
    assert chosen([measured(1, {"b": 1000})]) == {1: (128, 2)}
    assert chosen([measured(1, {})]) == {}


def test_attention_uses_a_library_in_all_buckets_or_in_none():
    shapes = [measured(1, {"a": 100, "torch": 10}, kernel="varlen_attention"),
              measured(2, {"a": 100, "torch": 101}, kernel="varlen_attention"),
              measured(4, {"a": 100, "torch": 102}, kernel="varlen_attention")]  # fmt: skip
    assert {config["backend"] for _, config in choose(shapes, 0.05)} == {"triton"}
    shapes[1].times[1] = (shapes[1].times[1][0], 90)
    assert {config["backend"] for _, config in choose(shapes, 0.05)} == {"torch"}


def test_attention_keeps_one_key_block_in_all_buckets():
    shapes = [measured(1, {"a": 100, "c": 10}, kernel="varlen_attention"),
              measured(2, {"a": 100, "b": 80, "c": 99}, kernel="varlen_attention"),
              measured(4, {"a": 100, "b": 100, "c": 101}, kernel="varlen_attention")]  # fmt: skip
    assert chosen(shapes) == {1: (128, 1), 2: (128, 2), 4: (128, 1)}
    shapes[2].times[2] = (shapes[2].times[2][0], 50)
    assert chosen(shapes[::2]) == {1: (64, 1), 4: (64, 1)}
    apart = [measured(1, {"a": 1}, kernel="varlen_attention"), measured(2, {"c": 1}, kernel="varlen_attention")]
    assert chosen(apart) == {}


def test_ties_take_the_first_candidate():
    """Two runs with equal times write the same table."""
    configs = [{"BLOCK_T": size, "num_warps": warps} for warps in (4, 8, 2) for size in (4, 2, 8, 1, 16)]
    for first in range(len(configs)):
        order = configs[first:] + configs[:first]
        times = [(config, 2.0 if config is configs[0] else 1.0) for config in order]
        key = {"dtype": "bfloat16", "head_dim": 72, "tokens": 256}
        [(_, config)] = choose([MeasuredShape("rope", key, configs[0], times)], 0.25)
        assert config == next(one for one, time in times if time == 1.0)
