"""Specs against launchers: the variants that are compiled ahead of time are those that the launchers launch, the shapes to tune
for are those of the workload, and the tuning problems compute what the kernels compute."""

import pytest
import torch

from keye_kernels import reference
from keye_kernels.geometry import VisionBatch
from keye_kernels.segments import tile_schedule
from keye_kernels.tools.verify.checks import run_reference
from keye_kernels.triton import linear, patch_merge_norm, position_embedding_2d, rope, varlen_attention
from keye_kernels.triton.device import INTERPRETER_ARCH, MULTIPROCESSORS, Arch
from keye_kernels.triton.launch import Kernel
from keye_kernels.triton.registry import kernel_spec, verify_cases
from keye_kernels.triton.spec import TORCH_DTYPES, TuningShape, first_and_last, random_inputs

CPU, META = torch.device("cpu"), torch.device("meta")
WORKLOAD = {"images": [[2, 400], [1, 64]], "frames": [[8, 100]], "prompts": [[3, 1000]], "decode": [1, 16]}
TEXT, VISION = (32, 8, 128, [16, 24, 24], 64), (16, 16, 72, [18, 18], 18)  # heads, key heads, head dim, sections, frequencies


def launch_rope(part, dtype, config, weight_dtype, conjugate, to_cache):
    heads, key_heads, head_dim, sections, frequencies = TEXT if part == "text" else VISION
    q, k = (torch.empty(40, count, head_dim, dtype=dtype, device=META) for count in (heads, key_heads))
    norms = [weight_dtype and torch.empty(head_dim, dtype=weight_dtype, device=META)] * 2
    position_ids = torch.empty(len(sections), 40, dtype=torch.int64, device=META)
    rotation = position_ids, torch.empty(frequencies, device=META), sections
    if to_cache:
        caches = torch.empty(2, 2, 30, key_heads, head_dim, dtype=dtype, device=META).unbind(0)
        slots = torch.empty(20, dtype=torch.int64, device=META)
        rope.rope_to_cache(q, k, k, *rotation, *caches, slots, *norms, config=config)
    else:
        rope.rope(q, k, *rotation, *norms, conjugate=conjugate, config=config)


def launch_attention(part, dtype, config, has_schedule, return_lse):
    heads, key_heads, head_dim, *_ = TEXT if part == "text" else VISION
    fused = torch.empty(40, heads + 2 * key_heads, head_dim, dtype=dtype, device=META)
    q, k = (torch.empty(40, count, head_dim, dtype=dtype, device=META) for count in (heads, key_heads))
    offsets = torch.tensor([0, 40], dtype=torch.int32)
    schedule = tile_schedule(offsets, config["BLOCK_M"], False).to(META) if has_schedule else None
    arguments = q, k, fused[:, heads + key_heads :], offsets.to(META), 40, 0.1, part == "text", return_lse, schedule
    varlen_attention.varlen_attention(*arguments, config=config)


def launch_linear(part, dtype, config):
    out = 4608 if part == "linear_1" else 4096
    x, weight, bias = (torch.empty(size, dtype=dtype, device=META) for size in ((40, 4608), (out, 4608), (out,)))
    linear.linear(x, weight, bias, part == "linear_1", "triton", config)


def launch_norm(dtype, config, norm_width, gathered):
    features, weight = (torch.empty(size, dtype=dtype, device=META) for size in ((40, 1152), (norm_width,)))
    index = torch.empty(10, 4, dtype=torch.int32, device=META) if gathered else None
    patch_merge_norm.patch_merge_norm(features, index, weight, weight, config=config)


def launch_positions(dtype, config):
    features, table = (torch.empty(rows, 1152, dtype=dtype, device=META) for rows in (40, 729))
    corners = torch.empty(40, 4, dtype=torch.int32, device=META), torch.empty(40, 4, device=META)
    position_embedding_2d.position_embedding_2d(features, table, *corners, config)


def launched(kernel, part, dtype, config):
    """A launch of each variant of `KernelSpec.variants`, in order."""
    torch_dtype = TORCH_DTYPES[dtype]
    if kernel == "rope":
        kinds = [(weight, False, to_cache) for weight in (torch_dtype, torch.float32) for to_cache in (True, False)]
        kinds = [*(dict.fromkeys(kinds) if part == "text" else ()), (None, False, False), (None, True, False)]
        return [lambda kind=kind: launch_rope(part, torch_dtype, config, *kind) for kind in kinds]
    if kernel == "varlen_attention":
        kinds = [(True, False), (False, False), (True, True)]
        return [lambda kind=kind: launch_attention(part, torch_dtype, config, *kind) for kind in kinds]
    if kernel == "patch_merge_norm":
        kinds = [(1152, False), (1152, True), (4608, False), (4608, True)]
        return [lambda kind=kind: launch_norm(torch_dtype, config, *kind) for kind in kinds]
    if kernel == "linear":
        return [lambda: launch_linear(part, torch_dtype, config)]
    return [lambda: launch_positions(torch_dtype, config)]


TRITON_NAMES = {**{dtype: name for name, dtype in TORCH_DTYPES.items()}, torch.int32: "i32", torch.int64: "i64"}


def argument_type(argument):
    if isinstance(argument, torch.Tensor):
        return f"*{TRITON_NAMES[argument.dtype]}:16"
    if hasattr(argument, "block_shape"):
        return f"tensordesc<{TRITON_NAMES[argument.base.dtype]}[{','.join(map(str, argument.block_shape))}]>"
    return {int: "i32", float: "fp32"}.get(type(argument))


@pytest.mark.parametrize("use_tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize(
    ("kernel", "part"),
    [("rope", "text"), ("rope", "vision"), ("varlen_attention", "text"), ("varlen_attention", "vision"), ("linear", "linear_1"),
     ("linear", "linear_2"), ("patch_merge_norm", "vision"), ("position_embedding_2d", "vision")],
)  # fmt: skip
def test_variants_are_what_the_launchers_launch(kernel, part, dtype, use_tma, monkeypatch):
    spec, found = kernel_spec(kernel), []
    config = spec.heuristic(TuningShape(kernel, part, 1, 40), dtype, INTERPRETER_ARCH)
    if "backend" in config:
        config |= {"backend": "triton", "use_tma": use_tma}
    if kernel == "linear":
        config |= {"BLOCK_K": 64}
    monkeypatch.setattr(Kernel, "_launch", lambda _, grid, *arguments, **constants: found.append((arguments, constants)))
    launches = launched(kernel, part, dtype, config)
    variants = spec.variants(part, dtype, INTERPRETER_ARCH, config)
    for launch in launches:
        launch()
    assert len(variants) == len(launches) == len(found)
    for variant, (arguments, constants) in zip(variants, found, strict=True):
        names = variant.kernel.arg_names
        types = dict(zip(names, map(argument_type, arguments), strict=False))
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
        assert variant.signature == types | constants, variant.label
        assert options == {name: getattr(variant, name) for name in options} and options["num_warps"] == variant.num_warps
        assert variant.num_stages == options.get("num_stages", 3)  # Triton's default
        assert variant.uses_tensor_cores == (kernel in ("linear", "varlen_attention") and dtype != "fp32")


def test_the_forward_pass_of_preview_in_bf16_is_marked():
    found = {
        (variant.kernel.__name__, variant.label)
        for name in ("rope", "varlen_attention", "linear", "patch_merge_norm", "position_embedding_2d")
        for variant in kernel_spec(name).shipped_variants(INTERPRETER_ARCH)
        if variant.in_bf16_forward
    }
    assert found == {
        ("rope_kernel", "text bf16 norm"),
        ("rope_kernel", "text bf16 norm to cache"),
        ("rope_kernel", "vision bf16"),
        ("varlen_attention_fwd_kernel", "vision bf16"),
        ("linear_kernel", "linear_1 bf16 128x256"),
        ("linear_kernel", "linear_2 bf16 128x256"),
        ("patch_merge_norm_kernel", "preview block bf16"),
        ("position_embedding_2d_kernel", "bf16"),
    }


@pytest.mark.parametrize("name", MULTIPROCESSORS)
def test_every_part_and_dtype_ships(name):
    arch = Arch(name)
    labels = {kernel: [v.label for v in kernel_spec(kernel).shipped_variants(arch)] for kernel, _ in KEYS}
    parts = [f"{part} {dtype}" for part in ("vision", "text") for dtype in TORCH_DTYPES]
    tma = ["vision bf16 TMA", "text bf16 TMA"] if arch.has_tma else []
    attention = [f"{part}{kind}" for part in parts for kind in ("", " searched", " lse")]
    assert sorted(labels["varlen_attention"]) == sorted(attention + tma)
    norms = [f"text {dtype} norm" for dtype in TORCH_DTYPES] + [
        f"text {dtype} norm with fp32 weights" for dtype in ("bf16", "fp16")
    ]
    to_cache = [f"{label} to cache" for label in norms]
    assert sorted(labels["rope"]) == sorted([*norms, *to_cache, *parts, *(f"{part} backward" for part in parts)])
    orders = [f"{edition} {order}" for edition in ("preview", "1.5") for order in ("block", "raster")]
    assert sorted(labels["patch_merge_norm"]) == sorted(f"{order} {dtype}" for order in orders for dtype in TORCH_DTYPES)
    assert sorted(labels["position_embedding_2d"]) == sorted(TORCH_DTYPES)
    for part, columns in (("linear_1", 4608), ("linear_2", 4096)):
        for dtype, torch_dtype in TORCH_DTYPES.items():
            # The configs of every number of rows
            configs = [linear.heuristic(arch, 2**bits + 1, columns, torch_dtype) for bits in range(15)]
            expected = {f"{part} {dtype} {config['BLOCK_M']}x{config['BLOCK_N']}" for config in configs}
            expected |= {f"{label} TMA" for label in expected if arch.has_tma and dtype == "bf16"}
            assert {label for label in labels["linear"] if label.startswith(f"{part} {dtype} ")} == expected


def test_scores_of_an_iteration_are_those_of_the_launch_config():
    for arch in map(Arch, MULTIPROCESSORS):
        for variant in kernel_spec("varlen_attention").shipped_variants(arch):
            blocks = variant.signature["BLOCK_M"] * variant.signature["BLOCK_N"]
            assert variant.scores_per_iteration == blocks and variant.num_warps in (4, 8)


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("rope", ["text 1 x 1", "text 1 x 16", "text 3 x 1000", "vision 2 x 400", "vision 1 x 64", "vision 8 x 100"]),
        ("varlen_attention", ["vision 2 x 400", "vision 1 x 64", "vision 8 x 100", "text 3 x 1000"]),
        ("position_embedding_2d", ["vision 2 x 400", "vision 1 x 64", "vision 8 x 100"]),
        ("patch_merge_norm", ["vision 2 x 100", "vision 1 x 16", "vision 8 x 25"]),
        ("linear", [f"{part} {use}" for part in ("linear_1", "linear_2") for use in ("2 x 100", "1 x 16", "8 x 25")]),
    ],
)
def test_the_shapes_of_a_workload(kernel, expected):
    shapes = kernel_spec(kernel).shapes(WORKLOAD)
    assert [str(shape) for shape in shapes] == [f"{kernel}, {text.replace(' ', ', ', 1)}" for text in expected]
    assert [shape.total for shape in shapes] == [shape.count * shape.size for shape in shapes]


KEYS = {
    ("cache_attention", "text"): {"dtype": "bfloat16", "head_dim": 128, "tokens": 2},
    ("rope", "text"): {"dtype": "bfloat16", "head_dim": 128, "tokens": 512},
    ("rope", "vision"): {"dtype": "bfloat16", "head_dim": 72, "tokens": 512},
    ("varlen_attention", "vision"): {"dtype": "bfloat16", "head_dim": 72, "mask": "none", "max_seqlen": 256},
    ("varlen_attention", "text"): {"dtype": "bfloat16", "head_dim": 128, "mask": "causal", "max_seqlen": 256},
    ("position_embedding_2d", "vision"): {"channels": 1152, "dtype": "bfloat16", "patches": 512},
    ("patch_merge_norm", "vision"): {"rows": 512, "channels": 1152, "dtype": "bfloat16"},
    ("linear", "linear_1"): {"rows": 512, "columns": 4608, "dtype": "bfloat16", "epilogue": "gelu"},
    ("linear", "linear_2"): {"rows": 512, "columns": 4096, "dtype": "bfloat16", "epilogue": "none"},
}


@pytest.mark.parametrize(("kernel", "part"), KEYS)
def test_config_keys(kernel, part):
    assert kernel_spec(kernel).config_key(TuningShape(kernel, part, 2, 200), "bf16") == KEYS[kernel, part]


@pytest.mark.parametrize(("kernel", "part"), KEYS)
def test_tuning_problems_expect_what_the_kernel_computes(kernel, part):
    """Two segments in the interpreter; the reference of other inputs does not match."""
    problem = kernel_spec(kernel).tuning_problem(TuningShape(kernel, part, 2, 6), "fp16", CPU, reference)
    config = kernel_spec(kernel).heuristic(TuningShape(kernel, part, 2, 6), "fp32", INTERPRETER_ARCH)
    outputs, expected = problem.launch(config), problem.expect(torch.float64)
    num_rows = 2 if kernel == "cache_attention" else 12  # one token of each segment, or all
    assert len(outputs) == len(expected) and problem.rows.tolist() == list(range(num_rows))
    for out, exact in zip(outputs, expected, strict=True):
        assert exact.dtype == torch.float64 and out.dtype == torch.float16
        error = (out[problem.rows].double() - exact).abs().max() / exact.abs().max()
        assert error < 4 * torch.finfo(torch.float16).eps
        assert exact.std() > 0.1 and not torch.equal(exact[0], exact[1])


def test_compared_rows_are_the_first_and_the_last():
    assert first_and_last(5, CPU, count=3).tolist() == [0, 1, 2, 3, 4]
    assert first_and_last(6, CPU, count=3).tolist() == [0, 1, 2, 3, 4, 5]
    assert first_and_last(9, CPU, count=3).tolist() == [0, 1, 2, 6, 7, 8]
    assert first_and_last(2, CPU, count=3).tolist() == [0, 1] and len(first_and_last(10_000, CPU)) == 4096
    first, again = (random_inputs("fp16", CPU) for _ in range(2))
    assert torch.equal(first(4), again(4)) and not torch.equal(first(4), first(4))
    assert first(4).dtype == torch.float16 and 0.05 < first(1000, scale=0.1).std() < 0.2


def test_attention_compares_the_first_and_the_last_segment():
    problem = kernel_spec("varlen_attention").tuning_problem(
        TuningShape("varlen_attention", "vision", 3, 5), "fp16", CPU, reference
    )
    assert problem.rows.tolist() == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14] and len(problem.expect(torch.float32)[0]) == 10


@pytest.mark.parametrize("real_sizes", [False, True], ids=["small", "real"])
def test_verify_cases_cover_the_options_of_the_operators(real_sizes):
    drawn = {}
    for case in verify_cases(real_sizes, run_reference):
        drawn.setdefault(case.operator, []).append(case.draw(torch.Generator().manual_seed(0)))
    rope_3d, rope_2d, attention = drawn["rope_3d"], drawn["rope_2d"], drawn["varlen_attention"]
    assert sorted("q_norm_weight" in a for a in rope_3d) == [False, True] and len(rope_2d) == 1
    for arguments in (*rope_3d, *rope_2d):
        positions, tokens = arguments["position_ids"], arguments["q"].shape[0]
        assert tokens % 16 and arguments["k"].shape[0] == tokens  # a block that is not full
        assert all(not torch.equal(positions[0], other) for other in positions[1:])
        assert positions.max() > (30_000 if len(positions) == 3 else 300)
        norms = [arguments[name] for name in ("q_norm_weight", "k_norm_weight") if name in arguments]
        assert not norms or not torch.equal(*norms)
    assert all(a["q"].shape[1] > a["k"].shape[1] for a in rope_3d)

    (to_cache,) = drawn["rope_3d_to_cache"]
    sequences, cache_slots = to_cache["key_cache"].shape[:2]
    tokens, slots = to_cache["q"].shape[0], to_cache["slots"]
    assert tokens == sequences * len(slots) and tokens % 2 and sequences > 1  # sequences end within a block
    assert slots.diff().max() < 0 and 0 < len(slots.unique()) == len(slots) < cache_slots and "q_norm_weight" in to_cache

    kinds = {(a["causal"], a["return_lse"]) for a in attention}
    assert kinds == {(causal, lse) for causal in (False, True) for lse in (False, True)}
    for arguments in attention:
        lengths, (heads, key_heads) = arguments["cu_seqlens"].diff().tolist(), (arguments[x].shape[1] for x in "qk")
        assert arguments["max_seqlen"] == max(lengths) > 128 and sum(lengths) == len(arguments["q"])
        assert len(lengths) == 1 or ({1, min(lengths)} <= set(lengths) and any(length % 16 > 1 for length in lengths))
        assert (heads > key_heads) == arguments["causal"] and arguments["q"].shape[2] == (128 if arguments["causal"] else 72)
    assert any(0 in a["cu_seqlens"].diff() for a in attention) and any(a["q"].std() > 2 for a in attention)

    projector, positions = drawn["patch_merge_projection"], drawn["position_embedding_2d"]
    assert {len(a["norm_weight"]) // a["features"].shape[1] for a in projector} == {1, 4} and len(projector) == 4
    for arguments in (*projector, *positions):
        grid = arguments["grid_thw"]
        assert len(grid) > 1 and len(arguments["features"]) == int(grid.prod(1).sum())
    assert any(a["grid_thw"][:, 0].max() > 1 for a in projector) and positions[0]["grid_thw"][:, 0].max() > 1
    assert all(abs(a["features"].mean() - 0.5) < 0.1 for a in projector)  # the norm has a mean to remove


def test_counted_cases_have_the_inputs_of_their_arguments():
    def batch(grid):
        return VisionBatch.build(grid, int(grid.prod(1).sum()), table_side=27)

    cases = {case.name: case for name in KEYS for case in kernel_spec(name[0]).counted_cases(batch)}
    assert set(cases) == {
        "cache_attention", "rope_2d", "rope_3d", "rope_3d_to_cache", "attention 1024", "attention ragged, 64 rows",
        "attention ragged, 128 rows", "patch_merge_projection", "position_embedding_2d",
    }  # fmt: skip
    for case in cases.values():
        tensors = [x for x in case.arguments.values() if isinstance(x, torch.Tensor)]
        pointers = {x.data_ptr() for x in tensors}
        # The frequencies, the offsets and a batch's tensors are not inputs that every implementation reads
        given = [x for x in (*case.inputs, *case.written) if x.data_ptr() in pointers]
        assert len(given) >= len(tensors) - 1 - (case.operator == "position_embedding_2d"), case.name
        assert case.limits["launches"] == {"patch_merge_projection": 3, "cache_attention": 2}.get(case.operator, 1), case.name
    flops = {name: cases[name].needed_flops for name in cases if name.startswith("attention")}
    assert flops == {"attention 1024": 4 * 72 * 1024**2, "attention ragged, 64 rows": 4 * 72 * (576**2 + 252**2 + 112**2 + 84**2),
                     "attention ragged, 128 rows": 4 * 72 * (576**2 + 252**2 + 112**2 + 84**2)}  # fmt: skip
    assert {name: cases[name].config["BLOCK_M"] for name in flops} == dict(zip(flops, (128, 64, 128), strict=True))
