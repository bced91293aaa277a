"""What the compiled kernels need on other GPUs: registers, spills, shared memory, instructions per attention score."""

import re
from collections import Counter
from typing import Any

from keye_kernels.tools.compile import Report, analyse_nvidia, check, compile_variant, hot_loop
from keye_kernels.triton.device import Arch
from keye_kernels.triton.registry import kernel_spec, kernel_specs

TARGETS = ("sm_80", "sm_90", "sm_100")
# In the hot loop of the vision tower's attention: instructions per score, integer instructions among them
SCORE_LIMITS = {"sm_80": (11, 1.5), "sm_90": (9, 1.5), "sm_100": (9, 1.5)}
MIN_WARPS_PER_MULTIPROCESSOR = 8
MIN_ACCESS_BYTES = 4  # per thread, in a hot loop

OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)")
INTEGER = re.compile(r"U?(?:IMAD|IADD\w*|VIADD\w*|LOP3|PLOP3|ISETP|SHF|LEA|IMNMX|VIMNMX\w*|SGXT|PRMT|IABS|POPC|BMSK|FLO)(?=\.|$)")
ACCESS = re.compile(r"(?:LDG|STG|STS|LDGSTS)(?=\.|$)")
WIDTH = re.compile(r"\.[US]?(8|16|64|128|256)(?=\.|$)")


def variants(target: str) -> list[tuple[str, str]]:
    """(kernel, label) of the bf16 variants that Preview's forward pass launches. `tools.compile` checks all others too."""
    return [
        (spec.name, variant.label)
        for spec in kernel_specs()
        for variant in spec.shipped_variants(Arch(target))
        if variant.in_bf16_forward
    ]


def analyse_variant(target: str, kernel: str, label: str) -> dict[str, Any]:
    """Compiles one variant, in a process whose Triton does not interpret, and analyses its machine code."""
    variant = next(one for one in kernel_spec(kernel).shipped_variants(Arch(target)) if one.label == label)
    report = check(target, kernel, variant)
    row = {
        "kernel": kernel, "variant": label, "target": target,
        "registers": report.registers, "stack_bytes": report.stack_bytes, "shared_bytes": report.shared_bytes,
        "blocks": report.resident_blocks, "warps": variant.num_warps, "above": list(report.failures),
        "instructions_per_score": None, "integer_per_score": None, "narrowest_access": None,
    }  # fmt: skip
    if not report.instructions:
        return row
    listing = analyse_nvidia(compile_variant(target, variant), Report(target, kernel, label))
    loop = analyse_loop(hot_loop(listing, "cuda") or listing)
    row["narrowest_access"] = loop["narrowest_access"]
    if variant.scores_per_iteration:
        scores_per_thread = variant.scores_per_iteration / (32 * variant.num_warps)
        row["instructions_per_score"] = loop["instructions"] / scores_per_thread
        row["integer_per_score"] = loop["integer"] / scores_per_thread
    return {**row, "above": row["above"] + above(row)}


def analyse_loop(lines: list[str]) -> dict[str, Any]:
    """Instructions, integer instructions, and the narrowest memory access in bytes per thread (None: no access)."""
    opcodes = [match[1] for match in map(OPCODE.match, lines) if match]
    bits = [bits for _, bits in access_widths(lines)]
    integer = sum(bool(INTEGER.match(op)) for op in opcodes)
    return {"instructions": len(opcodes), "integer": integer, "narrowest_access": min(bits) // 8 if bits else None}


def access_widths(lines: list[str]) -> Counter[tuple[str, int]]:
    """Counts the memory instructions by opcode and bits per thread, for example ("LDG", 128)."""
    opcodes = [match[1] for match in map(OPCODE.match, lines) if match]
    return Counter(
        (op.partition(".")[0], int(width[1]) if (width := WIDTH.search(op)) else 32) for op in opcodes if ACCESS.match(op)
    )


def above(row: dict[str, Any]) -> list[str]:
    """The budgets that a variant exceeds."""
    found = ["stack"] if row["stack_bytes"] else []
    if row["instructions_per_score"] is not None:
        limits = zip(("instructions_per_score", "integer_per_score"), SCORE_LIMITS[row["target"]], strict=True)
        found += [name for name, limit in limits if row[name] > limit]
        if row["blocks"] < 2 and row["blocks"] * row["warps"] < MIN_WARPS_PER_MULTIPROCESSOR:
            found.append("occupancy")
    if row["narrowest_access"] is not None and row["narrowest_access"] < MIN_ACCESS_BYTES:
        found.append("narrowest_access")
    return found
