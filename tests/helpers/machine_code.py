"""Reads the machine code of kernel variants in a process that compiles instead of interpreting. No GPU is needed."""

import json
import os
import subprocess
import sys
from typing import Any

from keye_kernels.tools.bench.machine_code import access_widths, read_variant, specs
from keye_kernels.tools.compile import Report, compile_spec, hot_loop, read_nvidia

Variant = tuple[str, str, str]  # target, kernel, label


def read_machine_code(*variants: Variant) -> list[dict[str, Any]]:
    """Returns for each variant the row of the counted benchmark.

    `accesses` and `loop_accesses` are added: the memory instructions of the whole kernel and of its hot loop by opcode and bits
    per thread, for example {"LDG.128": 9}.
    """
    command = [sys.executable, "-W", "ignore", "-m", __name__, json.dumps(variants)]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    call = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert call.returncode == 0, call.stderr
    return json.loads(call.stdout)


def _read(target: str, kernel: str, label: str) -> dict[str, Any]:
    spec = next(spec for spec in specs(target, kernel) if spec.label == label)
    listing = read_nvidia(compile_spec(target, spec), Report(target, kernel, label))
    row = read_variant(target, kernel, label)
    for name, lines in (("accesses", listing), ("loop_accesses", hot_loop(listing, "cuda"))):
        row[name] = {f"{opcode}.{bits}": count for (opcode, bits), count in access_widths(lines).items()}
    return row


if __name__ == "__main__":
    print(json.dumps([_read(*variant) for variant in json.loads(sys.argv[1])]))
