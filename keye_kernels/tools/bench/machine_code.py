"""What the compiled kernels cost on chips that are not here: registers, spills, shared memory, instructions a score."""

import re
from collections import Counter
from importlib import import_module
from typing import Any

from keye_kernels.tools.compile import Report, check, compile_spec, hot_loop, read_nvidia
from keye_kernels.triton.spec import CompileSpec

TARGETS = ("sm_80", "sm_90", "sm_100")
# The bf16 variants of Preview's forward pass, by kernel; the checker compiles all others too
VARIANTS = {
    "rope": r"text norm bf16|vision bf16",
    "position_embedding": r"bf16",
    "varlen_attention": r"vision bf16(?: up to \d+)?",
    "patch_merge": r"preview-block-bf16-.*-fused",
    "matmul": r"bf16-128x256",
}
# In the hot loop of the tower's attention: instructions a score, integer ones among them
SCORE_LIMITS = {"sm_80": (11, 1.5), "sm_90": (9, 1.5), "sm_100": (9, 1.5)}
LEAST_WARPS, LEAST_ACCESS = 8, 4  # warps on a multiprocessor; bytes a thread moves at once in a hot loop

OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)")
INTEGER = re.compile(
    r"U?(?:IMAD|IADD\w*|VIADD\w*|LOP3|PLOP3|ISETP|SHF|LEA|IMNMX|VIMNMX\w*|SGXT|PRMT|IABS|POPC|BMSK|FLO)(?=\.|$)"
)
ACCESS = re.compile(r"(?:LDG|STG|STS|LDGSTS)(?=\.|$)")
WIDTH = re.compile(r"\.[US]?(8|16|64|128|256)(?=\.|$)")


def variants(target: str) -> list[tuple[str, str]]:
    """(kernel, label) of what the table shows for a target."""
    found = []
    for kernel, pattern in VARIANTS.items():
        found += [(kernel, spec.label) for spec in specs(target, kernel) if re.fullmatch(pattern, spec.label)]
    return found


def specs(target: str, kernel: str) -> list[CompileSpec]:
    return import_module(f"keye_kernels.triton.{kernel}").compile_specs(int(target.removeprefix("sm_")))


def read_variant(target: str, kernel: str, label: str) -> dict[str, Any]:
    """Compiles one variant (in a process whose Triton does not interpret) and reads its machine code."""
    spec = next(spec for spec in specs(target, kernel) if spec.label == label)
    report = check(target, kernel, spec)
    row = {
        "kernel": kernel,
        "variant": label,
        "target": target,
        "registers": report.registers,
        "stack_bytes": report.stack_bytes,
        "shared_bytes": report.shared_bytes,
        "blocks": report.resident_blocks,
        "warps": spec.num_warps,
        "instructions_a_score": None,
        "integer_a_score": None,
        "narrowest_access": None,
        "above": list(report.failures),
    }
    if not report.instructions:
        return row
    listing = read_nvidia(compile_spec(target, spec), Report(target, kernel, label))
    row |= read_loop(hot_loop(listing, "cuda") or listing)
    if kernel == "varlen_attention":
        scores = spec.signature["BLOCK_M"] * spec.signature["BLOCK_N"] / (32 * spec.num_warps)  # a thread
        row["instructions_a_score"], row["integer_a_score"] = row["instructions"] / scores, row["integer"] / scores
    del row["instructions"], row["integer"]
    return {**row, "above": row["above"] + above(row)}


def read_loop(lines: list[str]) -> dict[str, Any]:
    """Instructions, integer ones among them, and the narrowest access to memory in bytes a thread (None: no access)."""
    opcodes = [match[1] for match in map(OPCODE.match, lines) if match]
    bits = [bits for _, bits in access_widths(lines)]
    return {
        "instructions": len(opcodes),
        "integer": sum(bool(INTEGER.match(op)) for op in opcodes),
        "narrowest_access": min(bits) // 8 if bits else None,
    }


def access_widths(lines: list[str]) -> Counter[tuple[str, int]]:
    """Counts the memory instructions by opcode and bits per thread, for example ("LDG", 128)."""
    opcodes = [match[1] for match in map(OPCODE.match, lines) if match]
    return Counter(
        (op.partition(".")[0], int(width[1]) if (width := WIDTH.search(op)) else 32)
        for op in opcodes
        if ACCESS.match(op)
    )


def above(row: dict[str, Any]) -> list[str]:
    """Which of the project's limits a variant exceeds."""
    found = ["stack"] if row["stack_bytes"] else []
    if row["instructions_a_score"] is not None:
        limits = SCORE_LIMITS[row["target"]]
        found += [
            name
            for name, limit in zip(("instructions_a_score", "integer_a_score"), limits, strict=True)
            if row[name] > limit
        ]
        if row["blocks"] < 2 and row["blocks"] * row["warps"] < LEAST_WARPS:
            found.append("occupancy")
    if row["narrowest_access"] is not None and row["narrowest_access"] < LEAST_ACCESS:
        found.append("narrowest_access")
    return found
