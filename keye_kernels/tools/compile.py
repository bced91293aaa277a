"""Compiles every kernel ahead of time for GPUs that are not here, and reports what the machine code needs.

    python -m keye_kernels.tools.compile --target sm_80,sm_90 [--kernel rope] [--json]

Needs Triton and no GPU. Exit code 1 if a variant does not compile, spills inside a loop, needs more shared memory than a block
may have, or runs matmuls without tensor-core instructions; 2 for an unknown target or kernel.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from keye_kernels.tools.autotune.command import names
from keye_kernels.tools.running import exit_code, worker_pool
from keye_kernels.triton.device import MULTIPROCESSORS, Arch
from keye_kernels.triton.registry import kernel_names, kernel_spec
from keye_kernels.triton.spec import CompileVariant

DEFAULT_TARGETS = "sm_80,sm_90,sm_100,sm_120,gfx942"
REGISTERS = 64 << 10  # 32-bit registers of an NVIDIA multiprocessor, allocated to warps in units of 256
VECTOR_REGISTERS = 512  # per lane of a gfx942 SIMD, accumulation registers included, allocated in units of 8
RESERVED_SHARED_BYTES = 1 << 10  # per block, on NVIDIA
TENSOR_MEMORY_COLUMNS = 512

ARGUMENT_TYPE = re.compile(r"(\*k?)?(i1|[iu](8|16|32|64)|fp(16|32|64)|bf16|fp8\w+)(:16)?|tensordesc<.*>")
# Patterns in the assembly listing of each vendor
LABEL = {"cuda": r"^\s*(\.L_x_\d+):", "hip": r"^(\.LBB\d+_\d+):"}
JUMP = {"cuda": r"\bBRA\b.*(\.L_x_\d+)", "hip": r"\bs_c?branch\w*\s+(\.LBB\d+_\d+)"}
SPILL = {"cuda": r"\*/\s+(?:@!?U?P\w+\s+)?(?:LDL|STL)\b", "hip": r"^\s*(?:scratch_(?:load|store)|buffer_\w+.*Folded)"}
INSTRUCTION = {"cuda": r"^\s*/\*[0-9a-f]{4,}\*/", "hip": r"^\s+[a-z]\w+(?:\s|$)"}
TENSOR = {"cuda": r"\*/\s+(?:@!?U?P\w+\s+)?[A-Z]+MMA\b", "hip": r"^\s*v_mfma_"}


@dataclass
class Report:
    """What one variant of a kernel needs on one target; `failures` are sentences about what is wrong with it."""

    target: str
    kernel: str
    label: str
    registers: int = 0
    stack_bytes: int = 0  # per thread; spills only, since the kernels have no local arrays
    spills_in_loop: int = 0  # instructions
    shared_bytes: int = 0
    resident_blocks: int = 0
    tensor_core_instructions: int = 0
    instructions: int = 0
    loop_instructions: int = 0  # in one iteration of the hot loop
    failures: list[str] = field(default_factory=list)


def check(target: str, kernel: str, variant: CompileVariant) -> Report:
    """Compiles one variant and analyses its machine code."""
    report = Report(target, kernel, variant.label)
    try:
        compiled = compile_variant(target, variant)
    except Exception as error:  # any compiler pass may raise anything: that is a finding
        message = str(error).strip().splitlines() or [""]
        report.failures.append(f"does not compile: {type(error).__name__}: {message[-1]}")
        return report
    vendor = compiled.metadata.target.backend
    listing = analyse_nvidia(compiled, report) if vendor == "cuda" else _analyse_amd(compiled, report)
    report.spills_in_loop = _count(SPILL[vendor], _lines_in_loops(listing, vendor))
    report.tensor_core_instructions = _count(TENSOR[vendor], listing)
    report.instructions = _count(INSTRUCTION[vendor], listing)
    report.loop_instructions = _count(INSTRUCTION[vendor], hot_loop(listing, vendor))
    if report.spills_in_loop:
        report.failures.append(f"spills inside a loop ({report.spills_in_loop} instructions)")
    if report.shared_bytes > (limit := MULTIPROCESSORS[target].shared_bytes_per_block):
        report.failures.append(f"needs {report.shared_bytes} bytes of shared memory, a block has {limit}")
    elif not report.resident_blocks:
        report.failures.append("needs more registers than a multiprocessor has")
    if variant.uses_tensor_cores and not report.tensor_core_instructions:
        report.failures.append("runs matmuls without tensor-core instructions")
    return report


def compile_variant(target: str, variant: CompileVariant) -> Any:
    """Triton's compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants, attributes = {}, {}, {}
    for position, name in enumerate(variant.kernel.arg_names):
        value = variant.signature[name]
        if isinstance(value, str) and ARGUMENT_TYPE.fullmatch(value):
            types[name] = value.removesuffix(":16")
            if value.endswith(":16"):
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            types[name], constants[(position,)] = "constexpr", value
    source = ASTSource(fn=variant.kernel, signature=types, constexprs=constants, attrs=attributes)
    arch = Arch(target)
    gpu = GPUTarget("cuda", arch.capability, 32) if arch.is_nvidia else GPUTarget("hip", target, 64)
    return triton.compile(source, target=gpu, options={"num_warps": variant.num_warps, "num_stages": variant.num_stages})


def analyse_nvidia(compiled: Any, report: Report) -> list[str]:
    """Fills in the resources of the report and returns the disassembly."""
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
    # Warp specialization launches more warps than requested
    warps = int(re.search(r"\.(?:req|max)ntid (\d+)", compiled.asm["ptx"])[1]) // 32
    by_warp = -(-report.registers * 32 // 256) * 256
    multiprocessor = MULTIPROCESSORS[report.target]
    report.resident_blocks = min(
        multiprocessor.warps // warps,
        multiprocessor.blocks,
        REGISTERS // 4 // by_warp * 4 // (-(-warps // 4) * 4),
        multiprocessor.shared_bytes // (report.shared_bytes + RESERVED_SHARED_BYTES),
        TENSOR_MEMORY_COLUMNS // max(getattr(compiled.metadata, "tmem_size", 0) or 0, 1),
    )
    return listing.splitlines()


def _analyse_amd(compiled: Any, report: Report) -> list[str]:
    """Fills in the resources of the report and returns the assembly."""
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    report.registers = number("vgpr_count")  # accumulation registers included
    report.stack_bytes, report.shared_bytes = number("private_segment_fixed_size"), compiled.metadata.shared
    warps, multiprocessor = compiled.metadata.num_warps, MULTIPROCESSORS[report.target]
    by_simd = min(multiprocessor.warps // 4, VECTOR_REGISTERS // (-(-max(report.registers, 1) // 8) * 8))
    shared_limit = multiprocessor.shared_bytes // max(report.shared_bytes, 1)
    report.resident_blocks = min(4 * by_simd // warps, multiprocessor.blocks, shared_limit)
    return text.splitlines()


def _loops(listing: list[str], vendor: str) -> list[range]:
    """The line ranges from a label to a jump back to it."""
    labels = {match[1]: line for line, text in enumerate(listing) if (match := re.search(LABEL[vendor], text))}
    found = ((line, re.search(JUMP[vendor], text)) for line, text in enumerate(listing))
    jumps = [(labels.get(match[1], line), line) for line, match in found if match]
    return [range(start, end) for start, end in jumps if start < end]


def _lines_in_loops(listing: list[str], vendor: str) -> list[str]:
    """All lines that are inside a loop."""
    return [listing[line] for line in sorted({line for loop in _loops(listing, vendor) for line in loop})]


def hot_loop(listing: list[str], vendor: str) -> list[str]:
    """The innermost loop with the most tensor-core instructions, then the most lines.

    Loops of a few instructions wait for a barrier. A jump across the end of a loop belongs to such a wait, moved elsewhere.
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
    """All variants of one kernel that ship for one target."""
    return [check(target, kernel, variant) for variant in kernel_spec(kernel).shipped_variants(Arch(target))]


def table(reports: list[Report]) -> str:
    """One line per variant."""
    head = (
        "target", "kernel", "variant", "registers", "stack bytes", "spills in loop", "shared bytes", "blocks",
        "tensor-core instructions", "instructions", "in hot loop",
    )  # fmt: skip
    rows = [head, *(tuple(map(str, list(asdict(report).values())[:-1])) for report in reports)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = []
    for row in rows:
        text = (cell.ljust(width) for cell, width in zip(row[:3], widths[:3], strict=True))
        numbers = (cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True))
        lines.append("  ".join((*text, *numbers)))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m keye_kernels.tools.compile", description=__doc__.split("\n")[0])
    parser.add_argument("--target", default=DEFAULT_TARGETS, help=f"of {', '.join(MULTIPROCESSORS)}")
    parser.add_argument("--kernel", default=",".join(kernel_names()), help="default: all of them")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args(arguments)
    return exit_code("keye_kernels.tools.compile", lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    targets = names(options.target, tuple(MULTIPROCESSORS), "target")
    kernels = names(options.kernel, kernel_names(), "kernel")
    with worker_pool(2, "0") as pool:
        done = pool.map(check_kernel, *zip(*product(targets, kernels), strict=True))
        reports = [report for part in done for report in part]

    failures = [f"{r.target} {r.kernel} {r.label}: {failure}" for r in reports for failure in r.failures]
    if options.json:
        print(json.dumps({"reports": [asdict(report) for report in reports], "failures": failures}, indent=2))
    else:
        print("\n".join([table(reports), *(f"FAILED {failure}" for failure in failures)]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
