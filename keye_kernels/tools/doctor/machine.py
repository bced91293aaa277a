"""The GPU and its driver, the implementation of each operator, the launch-config tables, and a short self-test."""

import json
import os
import shutil
import subprocess
import time
from typing import Any

from keye_kernels.tools.running import summary

from .versions import Package, Problem, guarded

NVIDIA_SMI_TIMEOUT_S = 10  # nvidia-smi hangs where the driver does
MIN_CAPABILITY = (8, 0)


def find_device(packages: dict[str, Package]) -> tuple[dict[str, Any], list[Problem]]:
    """What torch finds, and what prevents using it."""
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
        what = f"the NVIDIA driver {driver} is installed, but torch {torch.__version__} ({build}) finds no GPU"
        fix = "pip install --force-reinstall torch, with the CUDA version that https://pytorch.org lists for this driver"
        return found, [Problem(what, fix)]
    try:
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info(0)
    except Exception as error:
        return found, [Problem(f"the GPU does not answer: {summary(error)}", "nvidia-smi (or rocm-smi), then a new process")]
    found |= {
        "type": "cuda", "name": properties.name, "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count, "memory_gib": round(total / 2**30, 1),
        "free_gib": round(free / 2**30, 1), "count": torch.cuda.device_count(),
    }  # fmt: skip
    return found, _device_problems(packages, (properties.major, properties.minor), bool(torch.version.hip))


def _device_problems(packages: dict[str, Package], capability: tuple[int, int], is_amd: bool) -> list[Problem]:
    problems = []
    if packages["triton"].version is None:
        problems.append(Problem("there is a GPU, but no Triton: the eager reference runs, which is slow", "pip install triton"))
    if os.environ.get("TRITON_INTERPRET") == "1":
        what = "TRITON_INTERPRET=1 makes Triton interpret the kernels instead of compiling them"
        problems.append(Problem(what, "unset TRITON_INTERPRET"))
    if not os.environ.get("CC") and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        problems.append(Problem("no C compiler: Triton needs one to build kernel launchers", "apt-get install gcc, or set CC"))
    if not is_amd and capability < MIN_CAPABILITY:
        what = f"capability {capability[0]}.{capability[1]} is below 8.0, the oldest that the kernels support"
        problems.append(Problem(what, "export KEYE_KERNELS_IMPL=reference"))
    return problems


def _nvidia_driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=True)
    return answer.stdout.split()[0]


def find_operators(device_type: str) -> tuple[list[dict[str, Any]], list[Problem]]:
    """The implementation of each operator with impl="auto", and why."""
    import torch

    from keye_kernels.ops.implementation import ENVIRONMENT_VARIABLE, IMPLEMENTATIONS, resolve

    requested = os.environ.get(ENVIRONMENT_VARIABLE)
    rows, problems = [], []
    for operator in sorted(IMPLEMENTATIONS):
        try:
            impl = resolve("auto", operator, torch.device(device_type))
        except ValueError as error:
            rows.append({"operator": operator, "implementation": None, "why": str(error)})
            problems.append(Problem(f"{operator} cannot run: {error}", f"unset {ENVIRONMENT_VARIABLE}"))
            continue
        if requested and requested == impl:
            why = f"{ENVIRONMENT_VARIABLE}={requested}"
        elif impl == "triton":
            why = "there is a GPU, and Triton is installed"
        else:
            why = "there is no GPU" if device_type == "cpu" else "Triton is not installed"
        rows.append({"operator": operator, "implementation": impl, "why": why})
    return rows, problems


def find_backends(device_type: str) -> list[dict[str, str]]:
    """For each kernel that a library can replace: the backend that impl="auto" runs for Keye-VL-8B's sizes on this GPU."""
    from keye_kernels.ops.implementation import has_triton

    if device_type == "cpu" or not has_triton():
        return []
    import torch

    from keye_kernels.tools.autotune.workloads import WORKLOADS
    from keye_kernels.triton.device import device_arch
    from keye_kernels.triton.launch_config import launch_config
    from keye_kernels.triton.registry import kernel_specs

    device = torch.device(device_type)
    rows = []
    for spec in kernel_specs():
        for shape in spec.shapes(WORKLOADS["keye-8b"]):
            heuristic = spec.heuristic(shape, "bf16", device_arch(device))
            if "backend" in heuristic:
                config = launch_config(spec.name, device, spec.config_key(shape, "bf16"), heuristic)
                use = f"{shape.part}, {shape.count} x {shape.size}"
                rows.append({"kernel": spec.name, "use": use, "backend": str(config["backend"])})
    return rows


def find_tables(device_type: str) -> dict[str, Any]:
    """The first launch-config table that exists. Kernels without an entry there use the next table, or their heuristic."""
    if device_type == "cpu":
        return {"table": None, "note": "not used: there is no GPU"}
    import torch

    from keye_kernels.triton.device import device_name
    from keye_kernels.triton.launch_config import sibling_note, table_paths

    name = device_name(torch.device(device_type))
    paths = table_paths(name)
    for path in paths:
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            found = {"table": str(path), "triton": table["triton"], "kernels": ", ".join(sorted(table["kernels"]))}
            note = sibling_note(path, name).removeprefix(", ")
            return found | {"note": f"{note}; `keye-kernels autotune` writes one for this GPU"} if note else found
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"ignored: {summary(error)}; `rm {path} && keye-kernels autotune` writes a new one"
            return {"table": str(path), "error": what}
    return {"table": None, "note": f"heuristics of the kernels; `keye-kernels autotune` would write {paths[0]}"}


def self_test(device_type: str, impl: str) -> tuple[dict[str, Any], list[Problem]]:
    """One small case of each operator in float32 against float64, as in `verify`."""
    import torch

    from keye_kernels.tools.verify.checks import check, run_reference
    from keye_kernels.triton.registry import verify_cases

    start = time.perf_counter()
    one_each = {case.operator: case for case in reversed(verify_cases(False, run_reference))}
    results = [check(case, torch.float32, torch.device(device_type), impl, 1, 2) for case in one_each.values()]
    seconds = round(time.perf_counter() - start, 2)
    failed = [result for result in results if not result.passed]
    found = {"implementation": impl, "operators": len(results), "failed": [r.operator for r in failed], "seconds": seconds}
    fix = "run keye-kernels verify, and attach its table and this report to an issue of the project"
    whats = (f"{r.operator} is wrong (error {r.error:.1e}, allowed {r.allowed:.1e}, guards: {r.guards})" for r in failed)
    return found, [Problem(f"self-test: {what}", fix) for what in whats]
