import json
import os
import subprocess
import sys

import pytest

from keye_kernels.tools import compile as checker
from tests.helpers.machine_code import read_machine_code

MODULE = [sys.executable, "-W", "ignore", "-m", "keye_kernels.tools.compile"]

# A product of tiles that two warps cannot hold, with more stages than shared memory has room for
BAD_KERNEL = """
import dataclasses, sys
import triton
import triton.language as tl
from keye_kernels.tools import compile as checker
from keye_kernels.triton import position_embedding
from keye_kernels.triton.spec import CompileSpec

@triton.jit
def product_kernel(out_ptr, a_ptr, b_ptr, steps, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for step in range(steps):
        here = at + step * BLOCK * BLOCK
        total = tl.dot(tl.load(a_ptr + here), tl.load(b_ptr + here), total)
    tl.store(out_ptr + at, total)

signature = {"out_ptr": "*fp32:16", "a_ptr": "*fp16:16", "b_ptr": "*fp16:16", "steps": "i32", "BLOCK": 128}
embedding = position_embedding.compile_specs(80)[0]
for spec in (
    CompileSpec(product_kernel, "heavy", signature, 2, 4, True),
    CompileSpec(product_kernel, "broken", signature | {"BLOCK": 100}, 4, 1, True),
    CompileSpec(product_kernel, "sound, in any order", {"BLOCK": 64} | signature | {"BLOCK": 64}, 4, 2, True),
    dataclasses.replace(embedding, uses_tensor_cores=True),
):
    print("|".join(checker.check("sm_80", "test", spec).failures))
"""


def run(*command, **environment):
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"} | environment
    )


@pytest.fixture(scope="module")
def reports():
    # As a user who has set the interpreter would call it
    call = run(
        *MODULE, "--target", "sm_80,sm_90", "--kernel", "rope,position_embedding", "--json", TRITON_INTERPRET="1"
    )
    assert call.returncode == 0, call.stdout + call.stderr
    return json.loads(call.stdout)


def test_every_variant_compiles_without_a_finding(reports):
    assert reports["failures"] == []
    assert {(report["target"], report["kernel"]) for report in reports["reports"]} == {
        (target, kernel) for target in ("sm_80", "sm_90") for kernel in ("rope", "position_embedding")
    }
    for report in reports["reports"]:
        assert report["stack_bytes"] == report["spills_in_loop"] == report["shared_bytes"] == 0
        assert report["resident_blocks"] >= 4


def test_norm_and_rope_stay_within_70_registers(reports):
    norms = [report for report in reports["reports"] if report["label"].startswith("text norm")]
    assert len(norms) == 8 and all(0 < report["registers"] <= 70 for report in norms)


def test_accesses_are_wide():
    labels = {"rope": ("text norm bf16", "vision bf16", "vision fp32"), "position_embedding": ("bf16",)}
    for row in read_machine_code(*(("sm_90", kernel, label) for kernel in labels for label in labels[kernel])):
        kernel, label = row["kernel"], row["variant"]
        assert not any(name.endswith((".8", ".16")) for name in row["accesses"]), label
        stores = {int(name.split(".")[1]) for name in row["accesses"] if name.startswith("STG")}
        # The second half of a 72-wide head starts at byte 72, so 16-bit channels are stored 8 bytes at a time
        assert stores == {64 if label == "vision bf16" else 128}, (kernel, label)


def test_findings_are_named(tmp_path):
    script = tmp_path / "bad_kernel.py"
    script.write_text(BAD_KERNEL)
    call = run(sys.executable, "-W", "ignore", script)
    assert call.returncode == 0, call.stderr
    heavy, broken, sound, embedding = call.stdout.splitlines()
    assert "spills inside a loop" in heavy and "bytes of shared memory, a block has 166912" in heavy
    assert broken.startswith("does not compile: ")
    assert sound == ""
    assert embedding == "multiplies matrices without a tensor-core instruction"


def test_findings_make_the_exit_code_1(monkeypatch, capsys):
    report = checker.Report("sm_80", "rope", "text", failures=["spills inside a loop (3 instructions)"])

    class Pool:
        def __init__(self, *_, **__): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def map(self, *_):
            return [[report]]

    monkeypatch.setattr(checker, "ProcessPoolExecutor", Pool)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # put back afterwards
    assert checker.main(["--target", "sm_80", "--kernel", "rope"]) == 1
    assert "FAILED sm_80 rope text: spills inside a loop (3 instructions)" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--target", "sm_99"], ["--kernel", "softmax"], ["--target", "sm_90,"]])
def test_an_unknown_name_is_one_sentence_and_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        checker.main(arguments)
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert error.startswith("unknown ") and "choose from" in error and error.count("\n") == 1


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
def test_only_spills_between_a_label_and_a_jump_back_count(vendor, listing):
    assert checker._lines_in_loops(listing, vendor) == listing[:2]
    assert checker._lines_in_loops(listing[1:], vendor) == []
