"""`keye-kernels doctor`: what is installed, which implementation runs each operator, what is wrong, and how to fix it.

Packages that may be missing, torch included, are not imported at the top, and every probe is guarded: the diagnosis always
finishes.
"""

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from keye_kernels import __version__
from keye_kernels.tools.running import summary

from .machine import find_backends, find_device, find_operators, find_tables, self_test
from .versions import Problem, find_packages, guarded, torchs_triton, version_problems

# The kernel whose launch config chooses the backend of an operator's matmuls
MATMUL_KERNELS = {"patch_merge_projection": "linear", "linear_few_rows": "linear_few_rows"}


@dataclass
class Diagnosis:
    """What `diagnose` found; `problems` is empty on a healthy machine."""

    versions: dict[str, str] = field(default_factory=dict)
    device: dict[str, Any] = field(default_factory=dict)
    operators: list[dict[str, Any]] = field(default_factory=list)
    backends: list[dict[str, str]] = field(default_factory=list)
    tables: dict[str, Any] = field(default_factory=dict)
    self_test: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def diagnose() -> Diagnosis:
    """Probes this machine. Takes a few seconds, most of them for imports; on a GPU the first self-test compiles kernels."""
    found = Diagnosis()
    packages = find_packages()
    found.versions = {"python": platform.python_version(), "keye_kernels": __version__}
    found.versions |= {name: str(package) for name, package in packages.items()}

    def probe(what: str, run: Callable[[], tuple[Any, list[Problem]]], instead: Any) -> Any:
        try:
            result, problems = run()
        except Exception as error:  # no probe of a broken machine may end the diagnosis
            result, problems = instead, [Problem(f"{what}: {summary(error)}", "attach this report to an issue of the project")]
        found.problems += problems
        return result

    found.device = probe("the device cannot be examined", lambda: find_device(packages), {"type": "cpu"})
    kind = found.device["type"]
    pinned = guarded(torchs_triton, None)
    probe("the versions cannot be checked", lambda: ([], version_problems(packages, pinned, kind == "cpu")), [])
    if not packages["torch"].usable:
        return found
    found.operators = probe("the operators cannot be imported", lambda: find_operators(kind), [])
    found.tables = probe("the launch-config tables cannot be read", lambda: (find_tables(kind), []), {})
    found.backends = probe("the backends cannot be determined", lambda: (find_backends(kind), []), [])
    used = {row["implementation"] for row in found.operators if row["implementation"] not in ("flash_attn", "torch")}
    if len(used) == 1 and None not in used:
        found.self_test = probe("the self-test cannot run", lambda: self_test(kind, used.pop()), {})
    for row in found.operators:
        kernel = MATMUL_KERNELS.get(row["operator"])
        matmuls = sorted({backend["backend"] for backend in found.backends if backend["kernel"] == kernel})
        if row["implementation"] == "triton" and matmuls not in ([], ["triton"]):
            row["implementation"] = f"triton, matmuls: {' or '.join(matmuls)}"
    return found


def to_text(found: Diagnosis) -> str:
    lines = ["Versions", *(f"  {name:14} {text}" for name, text in found.versions.items())]
    lines += ["Device", *(f"  {name:14} {value}" for name, value in found.device.items() if value is not None)]
    lines += ["Operators", *(f"  {row['operator']:24} {row['implementation']} ({row['why']})" for row in found.operators)]
    if found.backends:
        lines += ["Backends with impl='auto', bf16"]
        lines += [f"  {row['kernel']:24} {row['use']}: {row['backend']}" for row in found.backends]
    lines += ["Launch configs", *(f"  {name:14} {value}" for name, value in found.tables.items() if value is not None)]
    if test := found.self_test:
        right = test["operators"] - len(test["failed"])
        lines += ["Self-test", f"  {right} of {test['operators']} operators agree with float64, in {test['seconds']} s"]
    if not found.problems:
        return "\n".join([*lines, "", "No problems found."])
    lines += ["", f"Problems: {len(found.problems)}"]
    for number, problem in enumerate(found.problems, 1):
        lines += [f"  {number}. {problem.what}", f"     fix: {problem.fix}"]
    return "\n".join(lines)


def run(options: argparse.Namespace) -> int:
    """The command. Prints text or a JSON object; returns 1 if there are problems."""
    found = diagnose()
    print(json.dumps(asdict(found), indent=2) if options.json else to_text(found))
    return 1 if found.problems else 0
