"""`keye-kernels bench --counted`: memory traffic, FLOPs and machine code of the kernels, counted without a GPU."""

import importlib.util
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

from tqdm import tqdm

from keye_kernels import __version__
from keye_kernels.tools.running import worker_pool

NOTES = """\
floor: every input read once, every output written once, no padded FLOPs; intermediates of several launches written and read once.
requested: bytes of all unmasked lanes, without caches. unique: distinct bytes of each launch.
Counted in Triton's interpreter in 16 bit, at sizes that keep the ratios: 128 tokens for rope, one head of attention, a narrower
projector, smaller images. Nothing here is a timing."""

Row = tuple[str, str]  # case and library


def count(targets: Sequence[str], chosen: Sequence[str] | None = None) -> dict[str, Any]:
    """Counts cases (all if None) in the interpreter and compiles for `targets`, each in a process of its own.

    Raises ImportError if Triton is not installed, and ValueError for an unknown case or target.
    """
    if importlib.util.find_spec("triton") is None:
        raise ImportError("counting needs Triton; install it with: pip install triton")
    ((rows, absent),) = _in_process("1", None, [(_rows, (chosen,))])
    traffic = _in_process("1", "counted", [(_count_row, row) for row in rows])
    code = []
    if targets:
        (found,) = _in_process("0", None, [(_variants, (tuple(targets),))])
        code = _in_process("0", "compiled", [(_analyse_variant, variant) for variant in found])
    versions = {"keye_kernels": __version__, "triton": version("triton"), "torch": version("torch")}
    return {"versions": versions, "traffic": traffic, "machine_code": code, "absent_peers": absent}


def _rows(chosen: Sequence[str] | None) -> tuple[list[Row], list[str]]:
    """What to count: each case with our kernels, then with installed peers; and the peers that are not installed."""
    from .counting import OURS, counted_cases
    from .peers import PEERS

    known = list(counted_cases())
    if unknown := [name for name in chosen or () if name not in known]:
        raise ValueError(f"case must be one of {', '.join(known)}, got {', '.join(map(repr, unknown))}")
    rows, absent = [], []
    for name in chosen or known:
        rows.append((name, OURS))
        for peer in PEERS:
            if peer.case == name and importlib.util.find_spec(peer.package):
                rows.append((name, peer.name))
            elif peer.case == name:
                absent.append(peer.name)
    return rows, absent


def _count_row(name: str, by: str) -> dict[str, Any]:
    from .counting import count_case

    return count_case(name, by)


def _in_process(interpret: str, label: str | None, calls: Sequence[tuple[Callable, tuple]]) -> list[Any]:
    """Runs calls in a new process, whose Triton interprets or compiles."""
    with worker_pool(1, interpret) as pool:
        futures = [pool.submit(call, *arguments) for call, arguments in calls]
        return [future.result() for future in tqdm(futures, desc=label, disable=None if label else True)]


def _variants(targets: Sequence[str]) -> list[tuple[str, str, str]]:
    from . import machine_code

    if unknown := [target for target in targets if target not in machine_code.TARGETS]:
        raise ValueError(f"target must be one of {', '.join(machine_code.TARGETS)}, got {', '.join(unknown)}")
    return [(target, *variant) for target in targets for variant in machine_code.variants(target)]


def _analyse_variant(target: str, kernel: str, label: str) -> dict[str, Any]:
    from . import machine_code

    return machine_code.analyse_variant(target, kernel, label)


TRAFFIC_HEAD = ("operator", "library", "launches", "requested / floor", "unique / floor", "FLOPs / needed", "idle", "budget")
CODE_HEAD = (
    "kernel", "target", "registers", "stack bytes", "shared bytes", "blocks x warps", "instructions per score", "integer",
    "narrowest access (bytes)", "budget",
)  # fmt: skip


def traffic_rows(traffic: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The cells of the first table."""
    rows = []
    for found in traffic:
        eager = f" + {found['eager_operators']} ops" if found["eager_operators"] else ""
        limits = found["limits"].items()
        kept = ", ".join(f"{name} {'ABOVE ' if name in found['above'] else '<= '}{limit:g}" for name, limit in limits)
        multiplies = "-" if found["multiplies"] is None else f"{found['multiplies']:.3f}"
        ratios = (f"{found['requested']:.3f}", f"{found['unique']:.3f}", multiplies)
        rows.append((found["operator"], found["by"], f"{found['launches']}{eager}", *ratios, str(found["idle"]), kept or "-"))
    return rows


def code_rows(code: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The cells of the second table."""
    rows = []
    for found in code:
        resources = (str(found[name]) for name in ("registers", "stack_bytes", "shared_bytes"))
        scores = (found["instructions_per_score"], found["integer_per_score"])
        budget = "; ".join(f"ABOVE: {name}" for name in found["above"]) or "met"
        rows.append((
            f"{found['kernel']}: {found['variant']}", found["target"], *resources, f"{found['blocks']} x {found['warps']}",
            *("-" if score is None else f"{score:.2f}" for score in scores), str(found["narrowest_access"] or "-"), budget,
        ))  # fmt: skip
    return rows


def to_text(found: dict[str, Any]) -> str:
    """Both tables as Markdown, and an explanation."""
    versions = ", ".join(f"{name} {text}" for name, text in found["versions"].items())
    parts = [versions, "", _markdown(TRAFFIC_HEAD, traffic_rows(found["traffic"]))]
    if found["machine_code"]:
        parts += ["", _markdown(CODE_HEAD, code_rows(found["machine_code"]))]
    parts += ["", NOTES]
    if found["absent_peers"]:
        parts.append(f"Not installed, and not counted: {', '.join(found['absent_peers'])}.")
    return "\n".join(parts)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rows = [head, *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def exceeds_limits(found: dict[str, Any]) -> bool:
    return any(row["above"] for row in found["traffic"] + found["machine_code"])
