"""`tools.compile`: blocks per multiprocessor, the hot loop of a listing, and each failure at its limit."""

from types import SimpleNamespace

import pytest

from keye_kernels.tools import compile as checker
from keye_kernels.tools.compile import Report
from keye_kernels.triton.device import MULTIPROCESSORS
from keye_kernels.triton.spec import CompileVariant


def nvidia(monkeypatch, target, *, registers=32, warps=4, shared=0, tmem=None, stack=0, listing=""):
    """The report of a compiled kernel that needs these resources."""
    metadata = SimpleNamespace(shared=shared, num_warps=4, target=SimpleNamespace(backend="cuda"))
    if tmem is not None:
        metadata.tmem_size = tmem
    compiled = SimpleNamespace(asm={"cubin": b"", "ptx": f".visible .entry\n.reqntid {32 * warps}\n"}, metadata=metadata)
    usage = f"Function kernel:\n REG:{registers} STACK:{stack} SHARED:0 LOCAL:0"

    def run(command, **options):
        return SimpleNamespace(stdout=usage if "cuobjdump" in str(command[0]) else listing)

    monkeypatch.setattr(checker.subprocess, "run", run)
    return compiled


@pytest.mark.parametrize(
    ("target", "needs", "blocks"),
    [
        # From NVIDIA's occupancy calculator
        ("sm_80", {"registers": 32}, 16),  # 64 warps
        ("sm_86", {"registers": 32}, 12),  # 48 warps
        ("sm_86", {"registers": 16, "warps": 1}, 16),  # 16 blocks
        ("sm_90", {"registers": 33}, 12),  # as for 40: allocated in units of 8 per thread
        ("sm_90", {"registers": 128}, 4),
        ("sm_90", {"registers": 129}, 3),
        ("sm_90", {"registers": 255, "warps": 8}, 1),
        ("sm_90", {"registers": 168, "warps": 12}, 1),
        ("sm_90", {"registers": 64, "warps": 8}, 4),
        ("sm_90", {"shared": 75 << 10}, 3),  # 228 KB of 75 + 1
        ("sm_90", {"shared": (76 << 10)}, 2),
        ("sm_90", {"shared": 227 << 10}, 1),
        ("sm_100", {"tmem": 256}, 2),
        ("sm_100", {"tmem": 512}, 1),
        ("sm_100", {"tmem": 0}, 16),
    ],
)
def test_blocks_of_an_nvidia_multiprocessor(target, needs, blocks, monkeypatch):
    report = Report(target, "kernel", "variant")
    assert checker.analyse_nvidia(nvidia(monkeypatch, target, stack=24, listing="a\nb", **needs), report) == ["a", "b"]
    assert report.resident_blocks == blocks
    assert (report.registers, report.stack_bytes, report.shared_bytes) == (needs.get("registers", 32), 24, needs.get("shared", 0))


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "blocks"),
    [
        (64, 4, 0, 8),
        (65, 4, 0, 7),
        (128, 4, 0, 4),
        (97, 4, 0, 4),
        (136, 4, 0, 3),
        (512, 4, 0, 1),
        (0, 1, 0, 16),
        (64, 4, 20 << 10, 3),
        (512, 8, 0, 0),
    ],
)
def test_blocks_of_an_amd_compute_unit(registers, warps, shared, blocks):
    text = f".vgpr_count: {registers}\n.private_segment_fixed_size: 12\n"
    compiled = SimpleNamespace(asm={"amdgcn": text}, metadata=SimpleNamespace(shared=shared, num_warps=warps))
    report = Report("gfx942", "kernel", "variant")
    checker._analyse_amd(compiled, report)
    assert (report.registers, report.stack_bytes, report.shared_bytes) == (registers, 12, shared)
    assert report.resident_blocks == blocks


def instructions(count, opcode="FFMA"):
    return [f"        /*0{index:03x}*/                   {opcode} R1, R2, R3 ;" for index in range(count)]


def loop(number, *body):
    return [f".L_x_{number}:", *body, f"        /*0fff*/              @P0 BRA `(.L_x_{number}) ;"]


TENSOR = instructions(1, "HMMA.16816.F32")


def test_the_hot_loop_is_the_innermost_one_with_the_most_tensor_core_instructions():
    long, busy = loop(1, *instructions(40)), loop(2, *instructions(10), *TENSOR)
    assert checker.hot_loop([*long, *busy], "cuda") == busy
    assert checker.hot_loop(long, "cuda") == long
    outer = loop(3, *instructions(20), *TENSOR * 4, *busy)
    assert checker.hot_loop(outer, "cuda") == busy
    waiting = loop(4, *TENSOR * 3)  # four instructions
    assert checker.hot_loop([*busy, *waiting], "cuda") == busy
    assert checker.hot_loop(instructions(40), "cuda") == []


def test_a_forward_jump_is_no_loop():
    skipped = ["        /*0000*/              @P0 BRA `(.L_x_9) ;", *instructions(10), ".L_x_9:"]
    assert checker.hot_loop(skipped, "cuda") == [] and checker._lines_in_loops(skipped, "cuda") == []


def checked(monkeypatch, *, target="sm_90", uses_tensor_cores=False, listing=(), **needs):
    compiled = nvidia(monkeypatch, target, listing="\n".join(listing), **needs)
    monkeypatch.setattr(checker, "compile_variant", lambda *_: compiled)
    return checker.check(target, "kernel", CompileVariant(None, "variant", {}, 4, 1, uses_tensor_cores))


@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_90"])
def test_a_block_may_use_all_of_its_shared_memory(target, monkeypatch):
    limit = MULTIPROCESSORS[target].shared_bytes_per_block
    assert checked(monkeypatch, target=target, shared=limit).failures == []
    [failure] = checked(monkeypatch, target=target, shared=limit + 1).failures
    assert failure == f"needs {limit + 1} bytes of shared memory, a block has {limit}"


def test_more_registers_than_there_are_fail(monkeypatch):
    assert checked(monkeypatch, registers=128, warps=16).failures == []
    assert checked(monkeypatch, registers=136, warps=16).failures == ["needs more registers than a multiprocessor has"]


def test_spills_fail_only_inside_a_loop(monkeypatch):
    spill = instructions(1, "STL.64")
    outside = checked(monkeypatch, stack=8, listing=[*spill, *loop(1, *instructions(9))])
    assert (outside.failures, outside.spills_in_loop, outside.instructions, outside.loop_instructions) == ([], 0, 11, 10)
    inside = checked(monkeypatch, stack=8, listing=loop(1, *instructions(9), *spill * 2))
    assert inside.failures == ["spills inside a loop (2 instructions)"] and inside.spills_in_loop == 2


@pytest.mark.parametrize("opcode, count", [("HMMA.16816.F32", 1), ("HGMMA.64x64x16.F32", 1), ("UTCHMMA", 1), ("FFMA", 0)])
def test_matmuls_need_tensor_core_instructions(opcode, count, monkeypatch):
    report = checked(monkeypatch, uses_tensor_cores=True, listing=instructions(1, opcode))
    assert report.tensor_core_instructions == count
    assert report.failures == ([] if count else ["runs matmuls without tensor-core instructions"])
    assert checked(monkeypatch, listing=instructions(1, opcode)).failures == []


@pytest.mark.parametrize("target, arch, warp", [("sm_90", 90, 32), ("sm_100", 100, 32), ("gfx942", "gfx942", 64)])
def test_what_triton_gets_to_compile(target, arch, warp, monkeypatch):
    import triton
    from triton import compiler

    sources, calls = [], []
    monkeypatch.setattr(compiler, "ASTSource", lambda **source: sources.append(source) or "source")
    monkeypatch.setattr(triton, "compile", lambda source, target, options: calls.append((source, target, options)))
    kernel = SimpleNamespace(arg_names=["x", "n", "scale", "BLOCK", "NAME"])
    signature = {"BLOCK": 64, "NAME": "silu", "x": "*bf16:16", "n": "i32:16", "scale": "fp32"}
    checker.compile_variant(target, CompileVariant(kernel, "v", signature, 8, 3, False))
    assert sources == [{
        "fn": kernel,
        "signature": {"x": "*bf16", "n": "i32", "scale": "fp32", "BLOCK": "constexpr", "NAME": "constexpr"},
        "constexprs": {(3,): 64, (4,): "silu"},
        "attrs": {(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]]},
    }]  # fmt: skip
    [(source, gpu, options)] = calls
    assert source == "source" and options == {"num_warps": 8, "num_stages": 3}
    assert (gpu.arch, gpu.warp_size, gpu.backend) == (arch, warp, "cuda" if warp == 32 else "hip")
