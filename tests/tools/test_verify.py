"""`verify`: correct kernels pass, and each kind of error that it checks for makes it fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from keye_kernels import reference
from keye_kernels.cli import main
from keye_kernels.tools import verify
from keye_kernels.tools.verify import answers, choose_setup
from keye_kernels.tools.verify.checks import CheckResult, run_reference
from keye_kernels.triton import rope, varlen_attention
from keye_kernels.triton.registry import verify_cases

EMPTY = torch.empty  # while `verify` guards allocations, torch.empty is another function
ROOT = Path(__file__).resolve().parents[2]
OPERATORS = [
    "add_norm", "cache_attention", "linear_few_rows", "patch_merge_projection", "position_embedding_2d", "rope_2d", "rope_3d",
    "rope_3d_to_cache", "silu_mul", "varlen_attention",
]  # fmt: skip


def small_cases():
    """All cases at the sizes of the interpreter."""
    return verify_cases(False, run_reference)


def first_cases(*operators):
    """The first small case of each operator."""
    return [next(case for case in small_cases() if case.operator == name) for name in operators]


def check(*operators, dtypes=(torch.float32,)):
    setup = choose_setup("cpu")._replace(dtypes=dtypes)
    return verify.verify(setup, seeds=1, chosen=first_cases(*operators), answers=False)


def replace_attention(monkeypatch, change):
    """Replaces the attention kernel by `change(attend, q, k, v)`, where `attend` is the reference."""

    def attention(q, k, v, cu_seqlens, max_seqlen, softmax_scale, causal, return_lse, *schedule):
        options = cu_seqlens, softmax_scale, causal, return_lse
        return change(lambda *tensors: reference.varlen_attention(*tensors, *options), q, k, v)

    monkeypatch.setattr(varlen_attention, "varlen_attention", attention)


def test_the_kernels_pass():
    results = check(*OPERATORS)
    assert [result.operator for result in results] == OPERATORS
    for result in results:
        assert result.passed and 0 < result.error < result.allowed, result


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_reference_passes_in_every_dtype(operator):
    small = [case for case in small_cases() if case.operator == operator]
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    setup = choose_setup("cpu")._replace(impl="reference", dtypes=dtypes)
    for result in verify.verify(setup, seeds=1, chosen=small, answers=False):
        assert result.passed, result


def test_a_kernel_that_is_slightly_wrong_fails_the_command(monkeypatch, capsys):
    def slightly_wrong(*inputs):
        return tuple(x * 1.0001 for x in reference.rope(*inputs))

    monkeypatch.setattr(rope, "rope", slightly_wrong)
    chosen = first_cases("rope_2d", "position_embedding_2d")
    monkeypatch.setattr(verify, "verify_cases", lambda real_sizes, reference: chosen)
    monkeypatch.setattr(verify, "check_answers", lambda device, impl: [])
    assert main(["verify", "--device", "cpu", "--seeds", "1", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    passed = {(line["operator"], line["dtype"]): line["passed"] for line in found["results"]}
    # In fp16 this error is smaller than the rounding error
    assert not passed["rope_2d", "fp32"] and passed["position_embedding_2d", "fp32"] and not found["passed"]
    assert "interpreter" in found["notes"][0]

    assert main(["verify", "--device", "cpu", "--seeds", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.endswith("FAIL")] == ["rope_2d"]
    assert "3 of 4 checks pass, 1 FAIL" in lines[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_attention_that_leaves_out_one_key_fails(dtype, monkeypatch):
    def without_a_key(attend, q, k, v):
        k = k.clone()
        k[10] = -100 * q[:, : k.shape[1]].mean(0)  # its probability is 0
        return attend(q, k, v)

    replace_attention(monkeypatch, without_a_key)
    (result,) = check("varlen_attention", dtypes=(dtype,))
    assert not result.passed and result.error > result.allowed


def test_a_racing_operator_fails(monkeypatch):
    calls = []

    def racing(attend, q, k, v):
        out, lse = attend(q, k, v)
        calls.append(1)
        return torch.nextafter(out, out + len(calls) % 2), lse  # one unit in the last place, in every second call

    replace_attention(monkeypatch, racing)
    (result,) = check("varlen_attention")
    assert result.runs_that_differ == 1 and result.error <= result.allowed and not result.passed


@pytest.mark.parametrize(
    ("where", "message"),
    [("input", "next to q"), ("output", "next to an output"), ("leak", "reads out of bounds"), ("hole", "unwritten")],
)
def test_out_of_bounds_accesses_and_unwritten_elements_fail(where, message, monkeypatch):
    def faulty(attend, q, k, v):
        out, lse = attend(q, k, v)
        result = torch.empty(q.shape, dtype=q.dtype).copy_(out)
        if where == "input" and q.stride(1) > q.shape[2]:
            q.as_strided((1,), (1,), q.storage_offset() + q.shape[2]).zero_()
        if where == "output" and result.untyped_storage().nbytes() > result.nbytes:
            result.as_strided((1,), (1,), result.storage_offset() + result.numel()).zero_()
        if where == "leak" and q.stride(1) > q.shape[2]:
            result[0] += 0 * q.as_strided((1,), (1,), q.storage_offset() + q.shape[2])
        if where == "hole" and torch.empty is not EMPTY:  # unguarded memory may still hold the right values
            result[0] = torch.empty(q.shape, dtype=q.dtype)[0]
        return result, lse

    replace_attention(monkeypatch, faulty)
    (result,) = check("varlen_attention")
    assert result.error <= result.allowed and not result.runs_that_differ
    assert message in result.guards and not result.passed


def test_an_operator_that_raises_fails_and_the_others_still_run(monkeypatch):
    def broken(*inputs):
        raise RuntimeError("out of resources: shared memory\nand a long trace")

    monkeypatch.setattr(rope, "rope", broken)
    first, second = check("rope_2d", "position_embedding_2d")
    assert not first.passed and first.guards == "raised RuntimeError: out of resources: shared memory"
    assert second.passed


def test_answers_that_differ_from_the_reference_fail(monkeypatch):
    device = torch.device("cpu")
    assert all(result.passed for result in answers.check_answers(device, "reference"))
    load = answers.small_model

    def load_with_broken_kernels(*, impl, **options):
        model = load(impl="reference", **options)
        if impl == "triton":
            model.mlp_AR.linear_2.weight.data.neg_()
        return model

    monkeypatch.setattr(answers, "small_model", load_with_broken_kernels)
    assert not all(result.passed for result in answers.check_answers(device, "triton"))


def test_a_nan_error_fails():
    assert not CheckResult("rope_2d", "", "fp32", float("nan"), 1.0, 1, 0, "ok", 0.0).passed


def run(code, **environment):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env)


def test_on_a_cpu_the_interpreter_is_chosen_before_triton_is_imported():
    result = run("""
import torch
from keye_kernels.tools import verify
setup = verify.choose_setup()
case = verify.verify_cases(False, verify.run_reference)[-1]
[result] = verify.verify(setup._replace(dtypes=(torch.float32,)), seeds=1, chosen=[case], answers=False)
print(setup.impl, result.passed, result.error > 0)
""")
    assert result.stdout.split() == ["triton", "True", "True"], result.stderr
    result = run("import triton; from keye_kernels.cli import main; raise SystemExit(main(['verify', '--device', 'cpu']))")
    assert result.returncode == 2 and "TRITON_INTERPRET=1 before Python starts" in result.stderr


def test_without_triton_the_reference_is_verified_and_it_says_so():
    code = "import sys; sys.modules['triton'] = None; from keye_kernels.cli import main; raise SystemExit(main(['verify']))"
    result = run(code)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "only the reference implementation" in result.stdout and " 0 FAIL" in result.stdout
    assert all(name in result.stdout for name in OPERATORS) and "bf16" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu9000"], "device must be a torch device"),
        (["--device", "cuda"], "finds no CUDA or ROCm GPU"),
        (["--device", "meta"], "device must be a CPU, CUDA or ROCm device, got 'meta'"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
    ],
)
def test_bad_input_names_the_argument(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["verify", *arguments]) == 2
    assert message in capsys.readouterr().err


# Compiles for an H100 with a driver that launches nothing. No GPU is needed
COMPILE_AHEAD = """
import torch
from tests.helpers.compiling_driver import install

install()
from keye_kernels.tools import verify
from keye_kernels.ops import implementation

implementation._require_triton = lambda impl, operator, device: None
setup = verify.Setup(torch.device("cpu"), "triton", False, (torch.float16,), 2, [])
chosen = verify.verify_cases(False, verify.run_reference)
with torch.no_grad():
    (first, known), again = verify.compile_ahead(chosen, setup), verify.compile_ahead(chosen, setup)
assert first >= 10 and known == 0 and again == (0, 0), (first, known, again)
"""


def test_kernels_are_compiled_ahead(tmp_path):
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE_AHEAD]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env, cwd=ROOT)
    assert run.returncode == 0, run.stderr


def test_an_error_of_compiling_ahead_is_ignored(monkeypatch):
    def fail(chosen, setup):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(verify, "compile_ahead", fail)
    monkeypatch.setattr(verify, "check", lambda case, dtype, device, impl, *rest: (case, dtype, impl))
    setup = verify.Setup(torch.device("cuda"), "triton", True, (torch.float16,), 2, [])
    case, projector = chosen = first_cases("rope_2d", "patch_merge_projection")
    assert verify.verify(setup, chosen=chosen, answers=False) == [
        (case, torch.float16, "triton"),
        (projector, torch.float16, "triton"),
        (projector, torch.float16, "torch"),
    ]


def test_on_a_gpu_the_projector_also_runs_with_the_matmuls_of_torch():
    gpu = verify.Setup(torch.device("cuda"), "triton", True, (torch.float16,), 2, [])
    assert verify.implementations(gpu, "patch_merge_projection") == ["triton", "torch"]
    assert verify.implementations(gpu, "varlen_attention") == ["triton"]
    cpu = gpu._replace(device=torch.device("cpu"))
    assert verify.implementations(cpu, "patch_merge_projection") == ["triton"]
    reference_only = gpu._replace(impl="reference")
    assert verify.implementations(reference_only, "patch_merge_projection") == ["reference"]
