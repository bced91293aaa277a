"""`keye-kernels doctor`: what is here, who would serve each operator, what is wrong, and the command that mends it.

Nothing that may be missing is imported at the top, torch included, and every probe is guarded: a diagnosis never ends early.
"""

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from keye_kernels import __version__

from .machine import find_device, find_operators, find_tiles, self_test
from .versions import Problem, find_packages, guarded, summary, torchs_triton, version_problems


@dataclass
class Diagnosis:
    """What `diagnose` found; healthy if there are no problems."""

    versions: dict[str, str] = field(default_factory=dict)
    device: dict[str, Any] = field(default_factory=dict)
    operators: list[dict[str, Any]] = field(default_factory=list)
    tiles: dict[str, Any] = field(default_factory=dict)
    self_test: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def diagnose() -> Diagnosis:
    """Probes this machine; takes a few seconds, most of them imports. On a GPU the self-test compiles kernels at first."""
    found = Diagnosis()
    packages = find_packages()
    found.versions = {"python": platform.python_version(), "keye_kernels": __version__}
    found.versions |= {name: str(package) for name, package in packages.items()}

    def probe(what: str, run: Callable[[], tuple[Any, list[Problem]]], instead: Any) -> Any:
        try:
            result, problems = run()
        except Exception as error:
            result, problems = (
                instead,
                [Problem(f"{what}: {summary(error)}", "send this report to the project's issues")],
            )
        found.problems += problems
        return result

    found.device = probe("the device cannot be examined", lambda: find_device(packages), {"type": "cpu"})
    found.problems += version_problems(packages, guarded(torchs_triton, None), found.device["type"] == "cpu")
    if not packages["torch"].usable:
        return found
    kind = found.device["type"]
    found.operators = probe("the operators cannot be imported", lambda: find_operators(kind), [])
    found.tiles = probe("the tile tables cannot be found", lambda: (find_tiles(kind), []), {})
    served = {row["implementation"] for row in found.operators if row["implementation"] != "flash_attn"}
    if len(served) == 1 and None not in served:
        found.self_test = probe("the self-test cannot run", lambda: self_test(kind, served.pop()), {})
    return found


def to_text(found: Diagnosis) -> str:
    lines = ["Versions", *(f"  {name:14} {text}" for name, text in found.versions.items())]
    lines += ["Device", *(f"  {name:14} {value}" for name, value in found.device.items() if value is not None)]
    lines += [
        "Operators",
        *(f"  {row['operator']:24} {row['implementation']} ({row['why']})" for row in found.operators),
    ]
    lines += ["Tiles", *(f"  {name:14} {value}" for name, value in found.tiles.items() if value is not None)]
    if test := found.self_test:
        right = test["operators"] - len(test["failed"])
        lines += ["Self-test", f"  {right} of {test['operators']} operators agree with float64, in {test['seconds']} s"]
    if not found.problems:
        return "\n".join([*lines, "", "No problems found."])
    lines += ["", f"Problems: {len(found.problems)}"]
    for number, problem in enumerate(found.problems, 1):
        lines += [f"  {number}. {problem.what}", f"     mend: {problem.mend}"]
    return "\n".join(lines)


def run(options: argparse.Namespace) -> int:
    """The command: prints the text or a JSON object; 1 if something is broken."""
    found = diagnose()
    print(json.dumps(asdict(found), indent=2) if options.json else to_text(found))
    return 1 if found.problems else 0
