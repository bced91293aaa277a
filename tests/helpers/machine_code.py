"""Analyses the machine code of kernel variants in a process that compiles instead of interpreting. No GPU is needed."""

import json
import os
import subprocess
import sys
from typing import Any

from keye_kernels.tools.bench.machine_code import access_widths, analyse_variant
from keye_kernels.tools.compile import Report, analyse_nvidia, compile_variant, hot_loop
from keye_kernels.triton.device import Arch
from keye_kernels.triton.registry import kernel_spec

Variant = tuple[str, str, str]  # target, kernel, label


def analyse_machine_code(*variants: Variant) -> list[dict[str, Any]]:
    """Returns for each variant the row of the counted benchmark.

    `accesses` and `loop_accesses` are added: the memory instructions of the whole kernel and of its hot loop by opcode and bits
    per thread, for example {"LDG.128": 9}.
    """
    command = [sys.executable, "-W", "ignore", "-m", __name__, json.dumps(variants)]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    call = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert call.returncode == 0, call.stderr
    return json.loads(call.stdout)


def _analyse(target: str, kernel: str, label: str) -> dict[str, Any]:
    variant = next(one for one in kernel_spec(kernel).shipped_variants(Arch(target)) if one.label == label)
    listing = analyse_nvidia(compile_variant(target, variant), Report(target, kernel, label))
    row = analyse_variant(target, kernel, label)
    for name, lines in (("accesses", listing), ("loop_accesses", hot_loop(listing, "cuda"))):
        row[name] = {f"{opcode}.{bits}": count for (opcode, bits), count in access_widths(lines).items()}
    return row


if __name__ == "__main__":
    print(json.dumps([_analyse(*variant) for variant in json.loads(sys.argv[1])]))
