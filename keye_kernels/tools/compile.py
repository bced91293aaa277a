"""Compiles every kernel for chips that are not here, and says what the machine code costs.

    python -m keye_kernels.tools.compile --target sm_80,sm_90 [--kernel rope] [--json]

Exit code 1 if a variant does not compile, spills inside a loop, needs more shared memory than a block may have, or
multiplies matrices without tensor-core instructions; 2 for an unknown target or kernel. Needs Triton and no GPU.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

from keye_kernels.triton.spec import CompileSpec

KERNELS = ("rope", "position_embedding", "varlen_attention", "patch_merge", "matmul")


@dataclass(frozen=True)
class Chip:
    """What one multiprocessor (compute unit) holds, from the vendors' programming guides."""

    warps: int
    blocks: int
    shared: int  # bytes
    shared_by_block: int  # bytes that one block may have


CHIPS = {
    "sm_80": Chip(64, 32, 164 << 10, 163 << 10),
    "sm_86": Chip(48, 16, 100 << 10, 99 << 10),
    "sm_89": Chip(48, 24, 100 << 10, 99 << 10),
    "sm_90": Chip(64, 32, 228 << 10, 227 << 10),
    "sm_100": Chip(64, 32, 228 << 10, 227 << 10),
    "sm_120": Chip(48, 24, 100 << 10, 99 << 10),
    "gfx942": Chip(32, 16, 64 << 10, 64 << 10),
}
REGISTERS = 64 << 10  # 32-bit registers of an NVIDIA multiprocessor, handed out to warps in units of 256
VECTOR_REGISTERS = 512  # of one lane of a gfx942 SIMD, accumulation registers included, handed out in units of 8
RESERVED_SHARED = 1 << 10  # an NVIDIA block's own

ARGUMENT_TYPE = re.compile(r"(\*k?)?(i1|[iu](8|16|32|64)|fp(16|32|64)|bf16|fp8\w+)(:16)?|tensordesc<.*>")
# What an assembly listing shows of each vendor: labels, jumps to them, spills, tensor-core instructions
LABEL = {"cuda": r"^\s*(\.L_x_\d+):", "hip": r"^(\.LBB\d+_\d+):"}
JUMP = {"cuda": r"\bBRA\b.*(\.L_x_\d+)", "hip": r"\bs_c?branch\w*\s+(\.LBB\d+_\d+)"}
SPILL = {"cuda": r"\*/\s+(?:@!?U?P\w+\s+)?(?:LDL|STL)\b", "hip": r"^\s*(?:scratch_(?:load|store)|buffer_\w+.*Folded)"}
INSTRUCTION = {"cuda": r"^\s*/\*[0-9a-f]{4,}\*/", "hip": r"^\s+[a-z]\w+(?:\s|$)"}
TENSOR = {"cuda": r"\*/\s+(?:@!?U?P\w+\s+)?[A-Z]+MMA\b", "hip": r"^\s*v_mfma_"}


@dataclass
class Report:
    """What one variant of a kernel costs on one target; `failures` says in words what is wrong with it."""

    target: str
    kernel: str
    label: str
    registers: int = 0
    stack_bytes: int = 0  # a thread; spills and nothing else, these kernels have no local arrays
    spills_in_loop: int = 0  # instructions
    shared_bytes: int = 0
    resident_blocks: int = 0
    tensor_core_instructions: int = 0
    instructions: int = 0
    loop_instructions: int = 0  # in one pass of the hot loop: of the innermost ones that with most tensor-core work
    failures: list[str] = field(default_factory=list)


def check(target: str, kernel: str, spec: CompileSpec) -> Report:
    """Compiles one variant and reads its machine code."""
    chip, report = CHIPS[target], Report(target, kernel, spec.label)
    try:
        compiled = compile_spec(target, spec)
    except Exception as error:  # whatever a pass of the compiler raises is the finding
        message = str(error).strip().splitlines() or [""]
        report.failures.append(f"does not compile: {type(error).__name__}: {message[-1]}")
        return report
    vendor = compiled.metadata.target.backend
    listing = read_nvidia(compiled, report) if vendor == "cuda" else _read_amd(compiled, report)
    report.spills_in_loop = _count(SPILL[vendor], _lines_in_loops(listing, vendor))
    report.tensor_core_instructions = _count(TENSOR[vendor], listing)
    report.instructions = _count(INSTRUCTION[vendor], listing)
    report.loop_instructions = _count(INSTRUCTION[vendor], hot_loop(listing, vendor))
    if report.spills_in_loop:
        report.failures.append(f"spills inside a loop ({report.spills_in_loop} instructions)")
    if report.shared_bytes > chip.shared_by_block:
        report.failures.append(
            f"needs {report.shared_bytes} bytes of shared memory, a block has {chip.shared_by_block}"
        )
    elif not report.resident_blocks:
        report.failures.append("needs more registers than a multiprocessor has")
    if spec.uses_tensor_cores and not report.tensor_core_instructions:
        report.failures.append("multiplies matrices without a tensor-core instruction")
    return report


def compile_spec(target: str, spec: CompileSpec) -> Any:
    """Triton's compiled kernel, made ahead of time."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants, attributes = {}, {}, {}
    for place, name in enumerate(spec.kernel.arg_names):
        value = spec.signature[name]
        if isinstance(value, str) and ARGUMENT_TYPE.fullmatch(value):
            types[name] = value.removesuffix(":16")
            if value.endswith(":16"):
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            types[name], constants[(place,)] = "constexpr", value
    source = ASTSource(fn=spec.kernel, signature=types, constexprs=constants, attrs=attributes)
    is_nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if is_nvidia else GPUTarget("hip", target, 64)
    return triton.compile(source, target=gpu, options={"num_warps": spec.num_warps, "num_stages": spec.num_stages})


def read_nvidia(compiled: Any, report: Report) -> list[str]:
    """Fills in the report and returns the disassembly."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage, listing = (
            subprocess.run([tools / command[0], command[1], cubin], capture_output=True, text=True, check=True).stdout
            for command in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    report.registers, report.stack_bytes, report.shared_bytes = int(registers), int(stack), compiled.metadata.shared
    # More than asked for where a kernel is specialised by warps
    threads = re.search(r"\.(?:req|max)ntid (\d+)", compiled.asm["ptx"])
    warps = int(threads[1]) // 32
    by_warp = -(-report.registers * 32 // 256) * 256
    chip = CHIPS[report.target]
    report.resident_blocks = min(
        chip.warps // warps,
        chip.blocks,
        REGISTERS // 4 // by_warp * 4 // (-(-warps // 4) * 4),
        chip.shared // (report.shared_bytes + RESERVED_SHARED),
        512 // max(getattr(compiled.metadata, "tmem_size", 0) or 0, 1),  # columns of tensor memory
    )
    return listing.splitlines()


def _read_amd(compiled: Any, report: Report) -> list[str]:
    """Fills in the report and returns the assembly."""
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    report.registers = number("vgpr_count")  # accumulation registers included
    report.stack_bytes, report.shared_bytes = number("private_segment_fixed_size"), compiled.metadata.shared
    warps, chip = compiled.metadata.num_warps, CHIPS[report.target]
    by_simd = min(chip.warps // 4, VECTOR_REGISTERS // (-(-max(report.registers, 1) // 8) * 8))
    shared_limit = chip.shared // report.shared_bytes if report.shared_bytes else chip.blocks
    report.resident_blocks = min(4 * by_simd // warps, chip.blocks, shared_limit)
    return text.splitlines()


def _loops(listing: list[str], vendor: str) -> list[range]:
    """Lines from a label to a jump back to it."""
    labels = {match[1]: line for line, text in enumerate(listing) if (match := re.search(LABEL[vendor], text))}
    jumps = [(labels.get(match[1], line), line) for line, text in enumerate(listing)
             if (match := re.search(JUMP[vendor], text))]  # fmt: skip
    return [range(start, end) for start, end in jumps if start < end]


def _lines_in_loops(listing: list[str], vendor: str) -> list[str]:
    """The lines between a label and a jump back to it."""
    return [listing[line] for line in sorted({line for loop in _loops(listing, vendor) for line in loop})]


def hot_loop(listing: list[str], vendor: str) -> list[str]:
    """The innermost loop with most tensor-core instructions, then most lines.

    Short loops wait for a barrier. A jump that crosses the end of a loop comes from such a wait, moved out of the way.
    """
    loops = [range(loop.start, loop.stop + 1) for loop in _loops(listing, vendor)]
    loops = [loop for loop in loops if _count(INSTRUCTION[vendor], listing[loop.start : loop.stop]) > 8]
    loops = [b for b in loops if not any(a.start < b.start < a.stop < b.stop for a in loops)]
    inner = [a for a in loops if not any(a.start <= b.start and b.stop <= a.stop and a != b for b in loops)]
    bodies = [listing[loop.start : loop.stop] for loop in inner]
    return max(bodies, key=lambda body: (_count(TENSOR[vendor], body), len(body)), default=[])


def _count(pattern: str, listing: list[str]) -> int:
    return sum(bool(re.search(pattern, line)) for line in listing)


def check_kernel(target: str, kernel: str) -> list[Report]:
    """All variants of one kernel module on one target."""
    module = import_module(f"keye_kernels.triton.{kernel}")
    arch = int(target[3:]) if target.startswith("sm_") else target
    return [check(target, kernel, spec) for spec in module.compile_specs(arch)]


def table(reports: list[Report]) -> str:
    """One line a variant, for people."""
    head = (
        "target",
        "kernel",
        "variant",
        "registers",
        "stack B",
        "spills in loop",
        "shared B",
        "blocks",
        "tensor-core",
        "instructions",
        "hot loop",
    )
    rows = [head, *(tuple(map(str, list(asdict(report).values())[:-1])) for report in reports)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = []
    for row in rows:
        text = (cell.ljust(width) for cell, width in zip(row[:3], widths[:3], strict=True))
        numbers = (cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True))
        lines.append("  ".join((*text, *numbers)))
    return "\n".join(lines)


def _names(argument: str, known: tuple[str, ...], what: str) -> list[str]:
    names = argument.split(",")
    if unknown := [name for name in names if name not in known]:
        print(f"unknown {what} {', '.join(map(repr, unknown))}: choose from {', '.join(known)}", file=sys.stderr)
        raise SystemExit(2)
    return names


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m keye_kernels.tools.compile", description=__doc__.split("\n")[0])
    parser.add_argument("--target", default="sm_80,sm_90,sm_100,sm_120,gfx942", help=f"of {', '.join(CHIPS)}")
    parser.add_argument("--kernel", default=",".join(KERNELS), help="default: all of them")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    options = parser.parse_args(arguments)
    targets = _names(options.target, tuple(CHIPS), "target")
    kernels = _names(options.kernel, KERNELS, "kernel")

    # Triton either interprets or compiles for good, as its first import finds the environment: use fresh processes
    os.environ["TRITON_INTERPRET"] = "0"
    with ProcessPoolExecutor(max_workers=2, mp_context=multiprocessing.get_context("spawn")) as pool:
        cases = list(product(targets, kernels))
        done = pool.map(check_kernel, *zip(*cases, strict=True))
        reports = [report for part in done for report in part]

    failures = [f"{r.target} {r.kernel} {r.label}: {failure}" for r in reports for failure in r.failures]
    if options.json:
        print(json.dumps({"reports": [asdict(report) for report in reports], "failures": failures}, indent=2))
    else:
        print("\n".join([table(reports), *(f"FAILED {failure}" for failure in failures)]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
