"""The kernel linear_few_rows in the interpreter: any size, epilogues, launch configs, backends, memory traffic; and its code."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from keye_kernels import reference
from keye_kernels.model.config import KeyeConfig
from keye_kernels.ops.linear_few_rows import prefers_triton
from keye_kernels.tools.bench.traffic import count_traffic, tensor_bytes
from keye_kernels.triton import linear_few_rows as module
from keye_kernels.triton.device import MULTIPROCESSORS, Arch
from keye_kernels.triton.launch import Kernel
from keye_kernels.triton.launch_config import cdiv, invalid_fields
from keye_kernels.triton.linear_few_rows import heuristic, launch_constants, linear_few_rows, runs_in_triton
from keye_kernels.triton.linear_few_rows_cases import LAYERS
from keye_kernels.triton.registry import kernel_spec
from keye_kernels.triton.spec import TORCH_DTYPES, TuningShape
from tests.helpers.machine_code import analyse_machine_code
from tests.triton.test_specs import argument_type

HALF, CPU = (torch.float16, torch.bfloat16), torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
EPILOGUES = pytest.mark.parametrize("silu_mul", [False, True], ids=["linear", "silu_mul"])


def inputs(rows, width, columns, dtype=torch.float32, silu_mul=False, extras=True):
    """x, weight, bias, residual, silu_mul."""
    generator = torch.Generator().manual_seed(rows + width + columns)
    weight_rows = 2 * columns if silu_mul else columns
    shapes = (rows, width), (weight_rows, width), (weight_rows,), (rows, columns)
    x, weight, bias, residual = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    weight = (weight.float() * width**-0.5).to(dtype)
    return x, weight, bias if extras else None, residual if extras else None, silu_mul


def run(x, weight, bias, residual, silu_mul, **options):
    return linear_few_rows(x, weight, bias, residual, silu_mul, **{"backend": "triton", **options})


def exact(x, weight, bias, residual, silu_mul):
    out = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    if silu_mul:
        gate, up = out.chunk(2, dim=1)
        out = F.silu(gate) * up
    return out if residual is None else out + residual.double()


def assert_rounded_once(found, expected, dtype):
    assert found.dtype == dtype and found.shape == expected.shape and found.is_contiguous()
    error, roundings = (found.double() - expected).abs(), torch.finfo(dtype).eps / 2
    # Float32 sums may carry a value over the middle between two float16 numbers
    allowed = 1.02 * roundings * expected.abs() + 1e-5 if dtype != torch.float32 else torch.full_like(expected, 2e-5)
    assert (error <= allowed).all()


@DTYPES
@EPILOGUES
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 16])
def test_any_number_of_rows(rows, silu_mul, dtype, poisoned_empty):
    arguments = inputs(rows, 72, 21, dtype, silu_mul)
    assert_rounded_once(run(*arguments), exact(*arguments), dtype)


@DTYPES
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("width", [1, 3, 8, 24, 100, 1024, 1100, 2048])
def test_any_width(width, rows, dtype, poisoned_empty):
    """Less than a block of K, whole blocks, and a last block that is not full."""
    arguments = inputs(rows, width, 5, dtype, silu_mul=True)
    assert_rounded_once(run(*arguments), exact(*arguments), dtype)


@EPILOGUES
@pytest.mark.parametrize("given", [(True, False), (False, True), (False, False)], ids=["bias", "residual", "neither"])
def test_bias_and_residual_are_optional(given, silu_mul, poisoned_empty):
    for rows in (2, 5):
        x, weight, *extras, _ = inputs(rows, 40, 7, torch.float16, silu_mul)
        arguments = x, weight, *(extra if keep else None for extra, keep in zip(extras, given, strict=True)), silu_mul
        assert_rounded_once(run(*arguments), exact(*arguments), torch.float16)


def test_the_sum_with_the_residual_is_rounded_once():
    """2048 + 0.5 + 0.75 is 2050 rounded once, and 2048 where the product is rounded to float16 before."""
    x, weight = torch.tensor([[2048.0, 0.5]]).half(), torch.ones(4, 2).half()
    residual = torch.full((1, 4), 0.75).half()
    assert (run(x, weight, None, residual, False) == 2050).all() and (F.linear(x, weight) + residual == 2048).all()


@pytest.mark.parametrize("rows", [3, 7])
@pytest.mark.parametrize("width", [17, 100])
def test_nothing_past_the_inputs_is_used_or_past_the_output_is_written(rows, width, monkeypatch):
    arguments = inputs(rows, width, 21, torch.float16, silu_mul=True)
    expected, guarded, made = run(*arguments), [], []
    for tensor in arguments[:4]:
        buffer = torch.full((tensor.numel() + 4096,), torch.nan, dtype=tensor.dtype)
        guarded.append(buffer[: tensor.numel()].view(tensor.shape).copy_(tensor))

    def larger(shape, **options):
        made.append(torch.full((shape[0] + 3, *shape[1:]), 7.0, dtype=options["dtype"]))
        return made[-1][: shape[0]]

    monkeypatch.setattr(torch, "empty", larger)
    assert torch.equal(run(*guarded, True), expected)
    assert len(made) == 1 and (made[0][rows:] == 7).all()


@EPILOGUES
@pytest.mark.parametrize("rows", [4, 8])
def test_other_rows_and_other_columns_change_no_bit(rows, silu_mul):
    x, weight, bias, residual, _ = inputs(rows, 72, 21, torch.float16, silu_mul)
    expected = run(x, weight, bias, residual, silu_mul)
    changed, other = x.clone(), weight.clone()
    changed[1], other[3] = torch.nan, torch.nan
    found = run(changed, weight, bias, residual, silu_mul)
    kept = torch.arange(rows) != 1
    assert torch.equal(found[kept], expected[kept]) and found[1].isnan().all()
    found = run(x, other, bias, residual, silu_mul)
    kept = torch.arange(21) != 3
    assert torch.equal(found[:, kept], expected[:, kept]) and found[:, 3].isnan().all()


@pytest.mark.parametrize("name", ["x", "weight", "bias", "residual"])
def test_strides_change_no_bit(name):
    arguments = dict(zip(("x", "weight", "bias", "residual", "silu_mul"), inputs(3, 40, 9), strict=True))
    expected = run(**arguments)
    tensor = arguments[name]
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan)
    wide[..., ::2] = tensor
    assert torch.equal(run(**arguments | {name: wide[..., ::2]}), expected)


@EPILOGUES
def test_every_launch_config_computes_the_same(silu_mul):
    for rows, dtype, sizes in (
        (3, torch.float32, [{"BLOCK_C": n, "num_warps": warps} for n in (1, 8) for warps in (1, 8)]),
        (6, torch.float16, [{"BLOCK_N": n, "BLOCK_K": k, "num_warps": w} for n, k, w in ((16, 16, 1), (32, 64, 2), (16, 32, 8))]),
    ):
        arguments = inputs(rows, 200, 21, dtype, silu_mul)
        usual = heuristic(Arch("sm_90"), rows, dtype, silu_mul)
        for size in sizes:
            assert_rounded_once(run(*arguments, config={**usual, **size}), exact(*arguments), dtype)


@EPILOGUES
def test_the_backend_torch(silu_mul, poisoned_empty):
    """Torch's matmul rounds before what follows it, except for a residual without a bias."""
    for extras in (True, False):
        arguments = inputs(3, 40, 9, torch.float16, silu_mul, extras)
        residual = None if arguments[3] is None else arguments[3].clone()
        found = run(*arguments, backend="torch")
        torch.testing.assert_close(found.double(), exact(*arguments), atol=4e-3, rtol=4e-3)
        assert residual is None or torch.equal(arguments[3], residual), "the residual is not modified"
    x, weight, _, residual, _ = inputs(3, 40, 9, torch.float16)
    assert torch.equal(run(x, weight, None, residual, False, backend="torch"), torch.addmm(residual, x, weight.t()))


def test_auto_takes_the_backend_of_the_launch_config(monkeypatch):
    launches = []
    monkeypatch.setattr(Kernel, "_launch", lambda *_, **constants: launches.append(constants))
    arguments = inputs(3, 40, 9)
    linear_few_rows(*arguments)
    assert not launches and not runs_in_triton(CPU, torch.float32, 3, (9, 40), False)
    choice = module.heuristic
    monkeypatch.setattr(module, "heuristic", lambda *shape: choice(*shape) | {"backend": "triton"})
    module._config.cache_clear()
    linear_few_rows(*arguments)
    assert len(launches) == 1 and runs_in_triton(CPU, torch.float32, 3, (9, 40), False)
    x, weight = torch.zeros(16, 40), torch.zeros(9, 40)
    assert prefers_triton(x, weight, True) and not prefers_triton(torch.zeros(17, 40), weight, False)
    assert not prefers_triton(x, torch.zeros(40, 9).t(), False), "a weight that is not contiguous would be copied"
    monkeypatch.undo()
    module._config.cache_clear()


def test_the_key_has_the_columns_of_the_output(monkeypatch):
    keys = []
    monkeypatch.setattr(module, "launch_config", lambda kernel, device, key, usual: keys.append(key) or usual)
    module._config.cache_clear()
    runs_in_triton(CPU, torch.float32, 3, (18, 40), True)
    linear_few_rows(*inputs(3, 40, 9, silu_mul=True))
    module._config.cache_clear()
    assert [key["columns"] for key in keys] == [9]


def test_no_rows_and_no_columns():
    assert run(*inputs(0, 8, 4)).shape == (0, 4) and run(*inputs(2, 8, 0)).shape == (2, 0)


@pytest.mark.parametrize(("rows", "silu_mul"), [(1, False), (1, True), (8, True)])
def test_weights_are_read_once(rows, silu_mul):
    arguments = inputs(rows, 1024, 32, torch.float16, silu_mul, extras=False)
    with count_traffic() as traffic:
        out = run(*arguments)
    floor, weight = tensor_bytes(*arguments[:2], out), tensor_bytes(arguments[1])
    assert len(traffic.launches) == 1 and traffic.idle_programs == 0 and not traffic.eager_operators
    assert traffic.unique == floor
    programs = traffic.launches[0].programs
    assert traffic.requested == weight + programs * tensor_bytes(arguments[0]) + tensor_bytes(out)


def configs(arch, rows, dtype=torch.bfloat16, silu_mul=False):
    return heuristic(Arch(arch), rows, dtype, silu_mul)


@pytest.mark.parametrize("name", MULTIPROCESSORS)
def test_the_heuristic(name):
    arch = Arch(name)
    warps = 128 // arch.warp_size
    for rows, columns in ((1, 4), (2, 4), (3, 2), (4, 2)):
        found = configs(name, rows)
        assert found == {"BLOCK_C": columns, "num_warps": warps, "use_pdl": False, "backend": "torch"}
        assert configs(name, rows, silu_mul=True)["BLOCK_C"] == max(1, columns // 2)
    assert [configs(name, rows, torch.float32)["BLOCK_C"] for rows in (4, 5, 16)] == [2, 1, 1]
    for rows in (5, 16):
        found = [configs(name, rows, dtype, silu_mul) for dtype in HALF for silu_mul in (False, True)]
        assert [config["BLOCK_K"] for config in found] == [128, 64] * 2 and {config["BLOCK_N"] for config in found} == {16}
        assert all((config["num_warps"], config["num_stages"], config["backend"]) == (warps, 3, "torch") for config in found)


@pytest.mark.parametrize("name", MULTIPROCESSORS)
def test_launch_constants(name, monkeypatch):
    arch = Arch(name)
    small = 8 if arch.is_nvidia else 16
    assert [module.block_rows(rows, torch.float16, arch) for rows in (1, 2, 3, 4, 5, 8, 9, 16)] == [
        1,
        2,
        4,
        4,
        small,
        small,
        16,
        16,
    ]
    assert [module.block_rows(rows, torch.float32, arch) for rows in (5, 8, 9)] == [8, 8, 16]
    for dtype, columns in ((torch.float16, 1024), (torch.float32, 512)):  # 16 bytes for each of 128 threads
        found = launch_constants(configs(name, 1, dtype), dtype, 1, 4096, arch)
        assert (found["BLOCK_K"], found["BLOCK_N"], found["SLICES"]) == (columns, 4, 0)
        assert launch_constants(configs(name, 1, dtype), dtype, 1, 100, arch)["BLOCK_K"] == 128
    for width, block_k in ((4096, 128), (500, 512 // (128 // arch.warp_size)), (16, 16)):
        found = launch_constants(configs(name, 8), torch.bfloat16, 8, width, arch)
        assert found["SLICES"] == found["num_warps"] and found["BLOCK_K"] == min(128, block_k) * found["SLICES"]
    monkeypatch.setattr(module, "TRITON_VERSION", (3, 4))
    assert module.block_rows(8, torch.float16, arch) == 16 and not module.has_pdl(arch)


def test_programmatic_dependent_launch_is_requested_where_it_exists(monkeypatch):
    config = configs("sm_90", 1) | {"use_pdl": True}
    for name in MULTIPROCESSORS:
        found = launch_constants(config, torch.bfloat16, 1, 4096, Arch(name))
        has_pdl = name in ("sm_90", "sm_100", "sm_120")
        assert found["USE_PDL"] == has_pdl == found.get("launch_pdl", False), name
    assert "launch_pdl" not in launch_constants(configs("sm_90", 1), torch.bfloat16, 1, 4096, Arch("sm_90"))


def test_programs_fill_a_gpu_without_a_split_of_k():
    """The narrowest layer has 4096 columns; an H100 has 132 multiprocessors."""
    assert cdiv(4096, configs("sm_90", 1)["BLOCK_C"]) > 7 * 132 and cdiv(4096, configs("sm_90", 8)["BLOCK_N"]) > 1.9 * 132


def test_weights_are_loaded_16_bytes_at_a_time():
    labels = [f"{part} {rows} rows bf16" for part in ("qkv", "gate_up", "down") for rows in (1, 4, 8, 16)]
    for row in analyse_machine_code(*(("sm_90", "linear_few_rows", label) for label in labels)):
        label, accesses = row["variant"], row["accesses"]
        assert row["stack_bytes"] == 0, label
        assert accesses["LDG.128"] >= 9 and row["blocks"] * row["warps"] >= 16, label
        # Narrower loads are those of the residual
        narrow = {name: count for name, count in accesses.items() if name.startswith("LDG.") and name != "LDG.128"}
        assert sum(narrow.values()) <= (8 if label.startswith("down") else 0), label
        if row["loop_accesses"]:
            loads = row["loop_accesses"]["LDG.128"]
            assert loads >= 5 if " 1 rows" in label or " 4 rows" in label else loads >= 8, label
            # Multiply-adds need no shared memory
            assert " 8 rows" in label or " 16 rows" in label or set(row["loop_accesses"]) == {"LDG.128"}, label


ORDER = """
import json, re
from keye_kernels.tools.compile import Report, analyse_nvidia, compile_variant
from keye_kernels.triton.device import Arch
from keye_kernels.triton.registry import kernel_spec
found = {}
for variant in kernel_spec("linear_few_rows").shipped_variants(Arch("sm_90")):
    if "PDL" in variant.label and "down" not in variant.label:
        listing = analyse_nvidia(compile_variant("sm_90", variant), Report("sm_90", "", ""))
        pattern = r"\\b(LDG\\.E\\.E[FL]|LDGSTS|ACQBULK|PREEXIT|STG)"
        found[variant.label] = [match[1] for line in listing if (match := re.search(pattern, line))]
print(json.dumps(found))
"""


def test_only_weights_are_read_before_the_predecessor_has_finished():
    """EF is evict_first, of weights; EL is evict_last, of x, which may also be copied to shared memory (LDGSTS)."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    call = subprocess.run([sys.executable, "-W", "ignore", "-c", ORDER], capture_output=True, text=True, env=environment)
    assert call.returncode == 0, call.stderr
    found = json.loads(call.stdout)
    assert len(found) == 8
    for label, order in found.items():
        wait = order.index("ACQBULK")
        assert wait >= 2 and set(order[:wait]) == {"LDG.E.EF"}, label
        assert order.count("PREEXIT") == 1 and set(order[order.index("PREEXIT") + 1 :]) == {"STG"}, label


def test_the_reference_is_the_definition():
    for silu_mul in (False, True):
        for extras in (False, True):
            arguments = inputs(3, 40, 9, torch.float16, silu_mul, extras)
            assert_rounded_once(reference.linear_few_rows(*arguments), exact(*arguments), torch.float16)


@pytest.mark.parametrize("part", ["gate_up", "down"])
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_variants_are_what_the_launcher_launches(part, dtype, monkeypatch):
    spec, found, arch, layer = kernel_spec("linear_few_rows"), [], Arch("sm_90"), LAYERS[part]
    monkeypatch.setattr(Kernel, "_launch", lambda _, grid, *arguments, **constants: found.append((arguments, constants)))
    variants = [variant for variant in spec.shipped_variants(arch) if f"{part} " in variant.label and dtype in variant.label]
    assert len(variants) == (8 if dtype == "bf16" else 4)
    for variant in variants:
        rows = variant.signature["BLOCK_T"]
        config = heuristic(arch, rows, TORCH_DTYPES[dtype], layer.silu_mul) | {"use_pdl": "PDL" in variant.label}
        shapes = (rows, layer.width), (layer.columns * (1 + layer.silu_mul), layer.width), (rows, layer.columns)
        x, weight, residual = (torch.empty(shape, dtype=TORCH_DTYPES[dtype], device="meta") for shape in shapes)
        run(x, weight, None, residual if layer.residual else None, layer.silu_mul, config=config)
        arguments, constants = found.pop()
        assert constants.pop("launch_pdl", False) == ("PDL" in variant.label)
        assert constants.pop("num_warps") == variant.num_warps and constants.pop("num_stages", 3) == variant.num_stages
        types = dict(zip(variant.kernel.arg_names, map(argument_type, arguments), strict=False))
        assert variant.signature == types | constants, variant.label
        assert variant.uses_tensor_cores == (rows > 4 and dtype != "fp32")


def test_the_spec_has_the_layers_of_the_decoder():
    config = KeyeConfig()
    heads, kv_heads, head_dim, hidden = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.hidden_size,
    )
    assert {part: (layer.columns, layer.width) for part, layer in LAYERS.items()} == {
        "qkv": ((heads + 2 * kv_heads) * head_dim, hidden),
        "o": (hidden, heads * head_dim),
        "gate_up": (config.intermediate_size, hidden),
        "down": (hidden, config.intermediate_size),
        "head": (config.vocab_size, hidden),
    }
    assert [part for part, layer in LAYERS.items() if layer.silu_mul] == ["gate_up"]
    assert [part for part, layer in LAYERS.items() if layer.residual] == ["down"]


def test_tuning():
    """Shapes, keys, candidates of both loops, and a problem whose expected result is that of the kernel."""
    spec, arch = kernel_spec("linear_few_rows"), Arch("sm_90")
    shapes = spec.shapes({"decode": [1, 16, 17], "prompts": [[1, 8]]})
    assert [(shape.part, shape.total) for shape in shapes] == [
        (f"{layer} {rows} rows", rows) for layer in LAYERS for rows in (1, 16)
    ]
    (odd,) = spec.shapes({"decode": [3]})[2:3]
    assert odd.part == "gate_up 4 rows" and spec.part_of(spec.config_key(odd, "bf16")) == odd.part
    assert spec.config_key(odd, "bf16") == {
        "block_rows": 4, "columns": 12288, "width": 4096, "dtype": "bfloat16", "epilogue": "silu_mul"
    }  # fmt: skip
    for shape in shapes:
        usual = spec.heuristic(shape, "bf16", arch)
        tried = spec.candidates(shape, arch, usual)
        assert usual["backend"] == "torch" and {config["backend"] for config in tried} == {"triton"}
        assert not any(invalid_fields({**usual, **config}, usual) for config in tried)
        assert not any("use_pdl" in config for config in tried), "not tested on a GPU"
        assert len(spec.refinements({**usual, **tried[0]})) == (3 if shape.total == 16 else 0)
        for config in tried:
            (variant,) = spec.variants(shape.part, "bf16", arch, {**usual, **config})
            assert variant.signature["BLOCK_T"] == shape.total
        assert spec.variants(shape.part, "bf16", arch, usual) == []


def test_the_tuning_problem_expects_what_the_kernel_computes(monkeypatch):
    monkeypatch.setitem(LAYERS, "gate_up", LAYERS["gate_up"]._replace(columns=24, width=64))
    monkeypatch.setitem(LAYERS, "down", LAYERS["down"]._replace(columns=24, width=64))
    spec = kernel_spec("linear_few_rows")
    for part in ("gate_up", "down"):
        problem = spec.tuning_problem(TuningShape("linear_few_rows", f"{part} 4 rows", 1, 3), "fp16", CPU, reference)
        config = heuristic(Arch("sm_90"), 3, torch.float16, part == "gate_up")
        (found,), (other,), (expected,) = (
            problem.launch(config | {"backend": "triton"}), problem.launch(config), problem.expect(torch.float64)
        )  # fmt: skip
        assert_rounded_once(found, expected, torch.float16)
        torch.testing.assert_close(other.double(), expected, atol=4e-3, rtol=4e-3)
        assert problem.rows.tolist() == [0, 1, 2] and expected.std() > 0.1
