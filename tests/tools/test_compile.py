"""`tools.compile`: the kernels compile without failures, and each kind of failure is reported."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from keye_kernels.tools import compile as checker
from keye_kernels.triton.device import MULTIPROCESSORS

KERNELS = ("rope", "position_embedding_2d")
MODULE = [sys.executable, "-W", "ignore", "-m", "keye_kernels.tools.compile"]

# The first variant needs too many registers for two warps, and more shared memory than a block has
BAD_KERNEL = """
import dataclasses
import triton
import triton.language as tl
from keye_kernels.tools import compile as checker
from keye_kernels.triton.device import Arch
from keye_kernels.triton.registry import kernel_spec
from keye_kernels.triton.spec import CompileVariant

@triton.jit
def matmul_kernel(out_ptr, a_ptr, b_ptr, steps, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for step in range(steps):
        here = at + step * BLOCK * BLOCK
        total = tl.dot(tl.load(a_ptr + here), tl.load(b_ptr + here), total)
    tl.store(out_ptr + at, total)

signature = {"out_ptr": "*fp32:16", "a_ptr": "*fp16:16", "b_ptr": "*fp16:16", "steps": "i32", "BLOCK": 128}
embedding = kernel_spec("position_embedding_2d").shipped_variants(Arch("sm_80"))[0]
for variant in (
    CompileVariant(matmul_kernel, "too large", signature, 2, 4, True),
    CompileVariant(matmul_kernel, "does not compile", signature | {"BLOCK": 100}, 4, 1, True),
    CompileVariant(matmul_kernel, "correct, in another order", {"BLOCK": 64} | signature | {"BLOCK": 64}, 4, 2, True),
    dataclasses.replace(embedding, uses_tensor_cores=True),
):
    print("|".join(checker.check("sm_80", "test", variant).failures))
"""


def run(*command, **environment):
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"} | environment)


@pytest.fixture(scope="module")
def reports():
    # A user may have set TRITON_INTERPRET
    command = [*MODULE, "--target", "sm_80,sm_90", "--kernel", ",".join(KERNELS), "--json"]
    call = run(*command, TRITON_INTERPRET="1")
    assert call.returncode == 0, call.stdout + call.stderr
    return json.loads(call.stdout)


def test_every_variant_compiles_without_failures(reports):
    assert reports["failures"] == []
    assert {(report["target"], report["kernel"]) for report in reports["reports"]} == {
        (target, kernel) for target in ("sm_80", "sm_90") for kernel in KERNELS
    }
    for report in reports["reports"]:
        assert report["stack_bytes"] == report["spills_in_loop"] == report["shared_bytes"] == 0
        assert report["resident_blocks"] >= 4


def test_norm_and_rope_stay_within_70_registers(reports):
    norms = [report for report in reports["reports"] if " norm" in report["label"] and "to cache" not in report["label"]]
    # Two targets; weights in the dtype of q, or float32 weights for q in 16 bits
    assert len(norms) == 2 * 5 and all(0 < report["registers"] <= 70 for report in norms)


def test_rope_to_the_cache_leaves_as_many_blocks_resident_as_rope(reports):
    """Up to 72 registers."""
    to_cache = [report for report in reports["reports"] if "to cache" in report["label"]]
    assert len(to_cache) == 2 * 5 and all(report["resident_blocks"] >= 7 for report in to_cache)
    assert all(0 < report["registers"] <= 72 for report in to_cache)


def test_failures_are_reported(tmp_path):
    script = tmp_path / "bad_kernel.py"
    script.write_text(BAD_KERNEL)
    call = run(sys.executable, "-W", "ignore", script)
    assert call.returncode == 0, call.stderr
    too_large, broken, correct, embedding = call.stdout.splitlines()
    limit = MULTIPROCESSORS["sm_80"].shared_bytes_per_block
    assert "spills inside a loop" in too_large and f"bytes of shared memory, a block has {limit}" in too_large
    assert broken.startswith("does not compile: ")
    assert correct == ""
    assert embedding == "runs matmuls without tensor-core instructions"


def test_a_failure_gives_exit_code_1(monkeypatch, capsys):
    report = checker.Report("sm_80", "rope", "text", failures=["spills inside a loop (3 instructions)"])

    pool = SimpleNamespace(map=lambda *_: [[report]])
    monkeypatch.setattr(checker, "worker_pool", lambda workers, interpret: nullcontext(pool))
    assert checker.main(["--target", "sm_80", "--kernel", "rope"]) == 1
    assert "FAILED sm_80 rope text: spills inside a loop (3 instructions)" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--target", "sm_99"], ["--kernel", "softmax"], ["--target", "sm_90,"]])
def test_an_unknown_name_gives_one_line_and_exit_code_2(arguments, capsys):
    assert checker.main(arguments) == 2
    error = capsys.readouterr().err
    assert "unknown " in error and "known: " in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("vendor", "listing"),
    [
        ("cuda", [".L_x_1:", " /*0010*/ LDL R1, [R2] ;", " /*0020*/ @P0 BRA `(.L_x_1) ;", " /*0030*/ STL [R2], R1 ;"]),
        (
            "hip",
            [".LBB0_1:", "\tscratch_load_dword v1, off", "\ts_cbranch_scc1 .LBB0_1", "\tscratch_store_dword off, v1"],
        ),
    ],
)
def test_only_spills_between_a_label_and_a_backward_jump_count(vendor, listing):
    assert checker._lines_in_loops(listing, vendor) == listing[:2]
    assert checker._lines_in_loops(listing[1:], vendor) == []
