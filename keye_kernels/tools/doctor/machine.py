"""The GPU and its driver, who would serve each operator on it, the tiles, and a short self-test."""

import json
import os
import shutil
import subprocess
import time
from typing import Any

from .versions import Package, Problem, guarded, summary

SECONDS_TO_ANSWER = 10  # of nvidia-smi, which may hang with a driver that does
OLDEST_CAPABILITY = (8, 0)


def find_device(packages: dict[str, Package]) -> tuple[dict[str, Any], list[Problem]]:
    """What torch sees, and what is in the way of using it."""
    driver = guarded(_nvidia_driver, None)
    found: dict[str, Any] = {"type": "cpu", "driver": driver}
    if not packages["torch"].usable:
        return found, []
    import torch

    found |= {"cuda": torch.version.cuda, "rocm": torch.version.hip}
    if not guarded(torch.cuda.is_available, False):
        if driver is None:
            return found, []
        build = "built without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
        what = f"NVIDIA's driver {driver} is here, but torch {torch.__version__} ({build}) finds no GPU"
        return found, [
            Problem(what, "pip install --force-reinstall torch, as https://pytorch.org says for this driver")
        ]
    try:
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info(0)
    except Exception as error:
        return found, [
            Problem(f"the GPU does not answer: {summary(error)}", "nvidia-smi (or rocm-smi), then a new process")
        ]
    found |= {
        "type": "cuda",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(total / 2**30, 1),
        "free_gib": round(free / 2**30, 1),
        "count": torch.cuda.device_count(),
    }
    return found, _device_problems(packages, (properties.major, properties.minor), bool(torch.version.hip))


def _device_problems(packages: dict[str, Package], capability: tuple[int, int], is_amd: bool) -> list[Problem]:
    problems = []
    if packages["triton"].version is None:
        problems.append(
            Problem("there is a GPU, but no Triton: only the slow reference would run", "pip install triton")
        )
    if os.environ.get("TRITON_INTERPRET") == "1":
        problems.append(
            Problem("TRITON_INTERPRET=1 interprets the kernels in place of compiling them", "unset TRITON_INTERPRET")
        )
    if not os.environ.get("CC") and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        problems.append(Problem("no C compiler: Triton needs one for its launchers", "apt-get install gcc, or set CC"))
    if not is_amd and capability < OLDEST_CAPABILITY:
        what = f"capability {capability[0]}.{capability[1]} is below 8.0, for which the kernels are made"
        problems.append(Problem(what, "export KEYE_KERNELS_IMPL=reference"))
    return problems


def _nvidia_driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_TO_ANSWER, check=True)
    return answer.stdout.split()[0]


def find_operators(device_type: str) -> tuple[list[dict[str, Any]], list[Problem]]:
    """Who would serve each operator with impl="auto", and why."""
    import torch

    from keye_kernels import ops
    from keye_kernels.ops.implementation import ENVIRONMENT_VARIABLE, resolve

    asked = os.environ.get(ENVIRONMENT_VARIABLE)
    rows, problems = [], []
    for operator in sorted(set(ops.__all__) - {"use_impl"}):
        try:
            impl = resolve("auto", operator, torch.device(device_type))
        except ValueError as error:
            rows.append({"operator": operator, "implementation": None, "why": str(error)})
            problems.append(Problem(f"{operator} cannot run: {error}", f"unset {ENVIRONMENT_VARIABLE}"))
            continue
        if asked and asked == impl:
            why = f"{ENVIRONMENT_VARIABLE}={asked}"
        elif impl == "triton":
            why = "a GPU, and Triton is installed"
        else:
            why = "no GPU" if device_type == "cpu" else "Triton is not installed"
        rows.append({"operator": operator, "implementation": impl, "why": why})
    return rows, problems


def find_tiles(device_type: str) -> dict[str, Any]:
    """The first table that serves launches, of those that exist; kernels it lacks use the next, or their heuristic."""
    if device_type == "cpu":
        return {"table": None, "note": "none in use: the kernels serve GPUs"}
    import torch

    from keye_kernels.triton import tiles

    device, note = torch.device(device_type), ""
    places = tiles.tables(device)
    for path in places:
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            if tiles.serves(table, device):
                return {"table": str(path), "method": table["method"], "triton": table["triton"]}
            note = f"{path} is passed over: ranked with Triton {table['triton']} for another chip or Triton; "
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"ignored: {summary(error)}; rm {path} && keye-kernels autotune writes a new one"
            return {"table": str(path), "error": what}
    return {"table": None, "note": f"{note}the kernels' heuristics; `keye-kernels autotune` would write {places[0]}"}


def self_test(device_type: str, impl: str) -> tuple[dict[str, Any], list[Problem]]:
    """One small use of each operator in float32 against float64, as `verify` does it."""
    import torch

    from keye_kernels.tools.verify.cases import cases
    from keye_kernels.tools.verify.checks import check

    start = time.perf_counter()
    one_each = {case.operator: case for case in reversed(cases(real_sizes=False))}
    results = [check(case, torch.float32, torch.device(device_type), impl, 1, 2) for case in one_each.values()]
    failed = [result for result in results if not result.passed]
    found = {
        "implementation": impl,
        "operators": len(results),
        "failed": [result.operator for result in failed],
        "seconds": round(time.perf_counter() - start, 2),
    }
    problems = [
        Problem(
            f"self-test: {r.operator} is wrong (error {r.error:.1e}, allowed {r.allowed:.1e}, guards: {r.guards})",
            "keye-kernels verify, and send its table with this report to the project's issues",
        )
        for r in failed
    ]
    return found, problems
