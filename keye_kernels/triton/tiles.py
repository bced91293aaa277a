"""Which tile a kernel uses: a table of this device where there is one, the kernel's own heuristic elsewhere.

Tables are looked for in the folder named by KEYE_KERNELS_TILES, in the user's cache, and in the package, in that order: first
the ones timed on a device of this name, then those ranked for its target ("sm_90"). The first with an entry for the case
serves. One JSON file holds one device:

    {"device": "NVIDIA H100 80GB HBM3", "triton": "3.9.0", "method": "timed", "kernels": {"rope": [
     {"dtype": "bfloat16", "head_dim": 128, "tokens": 4096, "config": {"num_warps": 4}, "median_us": 9.1}]}}

Of a case, what is in BUCKETS chooses the entry nearest by ratio, unless none is near (a sweep that was stopped knows nothing of
what it did not reach); all else must match an entry's exactly: the tile of one head dim may not fit a multiprocessor at another.
"""

import json
import logging
import math
import os
import re
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

Case = dict[str, int | str]
Config = dict[str, int | str | bool]
Entry = dict[str, Any]  # a case, its "config", and numbers for people

PACKAGE_TABLES = Path(__file__).parent / "tables"
BUCKETS = ("max_seqlen", "patches", "rows", "tokens")
RESULTS = (
    "config",
    "median_us",
    "p20_us",
    "p80_us",
    "heuristic_us",
    "rank",
)  # the fields of an entry that are no part of its case
TIMED, RANKED = "timed", "ranked, not timed"
FAR = 4  # an entry serves sizes up to so many times smaller or larger than its own
ALIKE = 1.5  # a ranked table serves chips of up to so many times more or fewer multiprocessors than it was made for

logger = logging.getLogger(__name__)
T = TypeVar("T")
_derived: list[Any] = []  # caches of `remember`


def tile(kernel: str, device: torch.device, key: Case, heuristic: Config) -> Config:
    """The configuration for one launch.

    Args:
        kernel: the kernel's name in the tables.
        device: where it runs.
        key: what the choice depends on; let integers that vary with every call be buckets, since each case is kept.
        heuristic: the configuration where no table has an entry; the fields that an entry leaves out come from it too.

    Never raises for what a table holds: a file that cannot be read is reported once and passed over.
    """
    found = _look_up(kernel, device, tuple(key.items()))
    if found and any(
        name not in heuristic or type(value) is not type(heuristic[name]) for name, value in found.items()
    ):
        _report(f"an entry of {kernel} is ignored: {found}; the kernel takes {heuristic}", logging.WARNING)
        return heuristic
    return {**heuristic, **found} if found else heuristic


def save(
    name: str,
    kernel: str,
    entries: list[Entry],
    folder: str | Path | None = None,
    method: str = TIMED,
    **remarks: int | str,
) -> Path:
    """Writes entries of one kernel into the table of a device or target; returns its path.

    Args:
        name: the device's (`device_name`) or the target's.
        entries: each replaces one of the same case. Entries of another Triton version or method are dropped: a table names one.
        folder: default: the first place of the look-up.
        remarks: further fields of the table, for people; a ranked one's `processors` says for how many it was ranked.

    The file is replaced as a whole, so that a reader never meets half of it. Raises OSError where it cannot be written.
    """
    path = table_path(name, folder)
    _read.cache_clear()
    table = _read(path)
    kept = table["kernels"] if table and (table["triton"], table["method"]) == (triton_version(), method) else {}
    cases = [_case(entry) for entry in entries]
    merged = [entry for entry in kept.get(kernel, []) if _case(entry) not in cases] + entries
    merged.sort(key=lambda entry: [(field, str(type(value)), value) for field, value in sorted(_case(entry).items())])
    table = {
        "device": name,
        "triton": triton_version(),
        "method": method,
        **remarks,
        "kernels": {**kept, kernel: merged},
    }
    write_whole(path, to_text(table))
    clear_cache()
    return path


def to_text(table: dict[str, Any]) -> str:
    """A table as JSON for people: one entry a line."""
    kernels = []
    for kernel, entries in sorted(table["kernels"].items()):
        lines = ",\n".join(f"   {json.dumps(entry)}" for entry in entries)
        kernels.append(f"  {json.dumps(kernel)}: [\n{lines}\n  ]")
    head = [f" {json.dumps(field)}: {json.dumps(value)}" for field, value in table.items() if field != "kernels"]
    return ",\n".join(["{\n" + head[0], *head[1:], ' "kernels": {\n' + ",\n".join(kernels) + "\n }\n}\n"])


def write_whole(path: Path, text: str) -> None:
    """Replaces a file at once, or leaves it as it was and raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def table_path(name: str, folder: str | Path | None = None) -> Path:
    """The file that holds the table of a device or target in `folder` (default: the first place of the look-up)."""
    return Path(folder or folders()[0]) / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', name)}.json"


def folders() -> list[Path]:
    """The places of the look-up, in order."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    places = [Path(cache_home) / "keye_kernels" / "tiles", PACKAGE_TABLES]
    named = os.environ.get("KEYE_KERNELS_TILES")
    return [Path(named), *places] if named else places


def tables(device: torch.device) -> list[Path]:
    """The files that would serve a device, in the order of the look-up, whether they exist or not."""
    names = [device_name(device), *([target] if (target := target_name(device)) else [])]
    return [table_path(name, folder) for name in names for folder in folders()]


@cache
def device_name(device: torch.device) -> str:
    """What its tables are called by: "NVIDIA H100 80GB HBM3"; for what is no GPU its type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def target_name(device: torch.device) -> str | None:
    """ "sm_90", "gfx942"; None for what is no GPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@cache
def triton_version() -> str:
    import triton  # late: reading and writing tables works without it being chosen to interpret or to compile

    return triton.__version__


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16", as tables have it."""
    return str(dtype).removeprefix("torch.")


# Triton's own two are made for constexprs as well, and slow


def cdiv(number: int, divisor: int) -> int:
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length() if number > 0 else 1


def remember(function: Callable[..., T]) -> Callable[..., T]:
    """Keeps what a launcher works out from a tile, by its (hashable) arguments, until `clear_cache`."""
    cached = lru_cache(maxsize=4096)(function)
    _derived.append(cached)
    return cached


def clear_cache() -> None:
    """Forgets what was looked up: tables are read again at the next launch."""
    for function in (_look_up, _read, device_name, target_name, *_derived):
        function.cache_clear()


@lru_cache(maxsize=4096)
def _look_up(kernel: str, device: torch.device, key: tuple[tuple[str, int | str], ...]) -> Config | None:
    name, paths = device_name(device), tables(device)
    for path in paths:
        table = _read(path)
        entry = _nearest(table["kernels"].get(kernel, []), dict(key)) if table else None
        if entry is None:
            continue
        if not serves(table, device):
            _report(
                f"{path} is passed over: ranked with Triton {table['triton']} for another chip or Triton", logging.INFO
            )
            continue
        _report(f"{kernel} on {name}: tiles from {path} ({table['method']})", logging.INFO)
        if not _of_this_triton(table):
            _report(
                f"{path} was measured with Triton {table['triton']}, this is {triton_version()}: "
                "run `keye-kernels autotune` to measure again",
                logging.WARNING,
            )
        return entry["config"]
    _report(f"{kernel} on {name}: tiles from the heuristic; a table would be read from {paths[0]}", logging.INFO)
    return None


def serves(table: dict[str, Any], device: torch.device) -> bool:
    """Whether launches on a device take tiles from a table: from a timed one always, with a warning if another Triton's.

    What a ranked one was ranked by, registers and shared memory, is nothing to another compiler or another size of chip.
    """
    return table["method"] == TIMED or (_of_this_triton(table) and _alike(table, device))


def _of_this_triton(table: dict[str, Any]) -> bool:
    return table["triton"].split(".")[:2] == triton_version().split(".")[:2]


def _alike(table: dict[str, Any], device: torch.device) -> bool:
    ranked_for = table.get("processors")
    if device.type != "cuda" or not isinstance(ranked_for, int):
        return True
    here = torch.cuda.get_device_properties(device).multi_processor_count
    return max(here, ranked_for) <= ALIKE * min(here, ranked_for)


@cache
def _read(path: Path) -> dict[str, Any] | None:
    """A table whose shape was checked; None, with one warning, for a file that holds none."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        for entries in table["kernels"].values():
            for entry in entries:
                fields = [*_case(entry).values(), *entry["config"].values()]
                if not all(isinstance(value, int | str) for value in fields):
                    raise ValueError(f"an entry has fields that are neither integers nor text: {entry}")
        table["triton"].split("."), table["method"].split()
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        _report(f"tile table {path} is ignored: {type(error).__name__}: {error}", logging.WARNING)
        return None
    return table


def _case(entry: Entry) -> Case:
    return {name: value for name, value in entry.items() if name not in RESULTS}


def _nearest(entries: list[Entry], key: Case) -> Entry | None:
    buckets = [name for name in key if name in BUCKETS]
    candidates = [
        entry
        for entry in entries
        if _case(entry).keys() == key.keys()
        and all(entry[name] == key[name] for name in key if name not in BUCKETS)
        and all(isinstance(entry[name], int) for name in buckets)
    ]

    def distance(entry: Entry) -> float:
        return sum(abs(math.log2(max(entry[name], 1) / max(key[name], 1))) for name in buckets)

    nearest = min(candidates, key=distance, default=None)
    return nearest if nearest is not None and distance(nearest) <= math.log2(FAR) else None


@cache
def _report(message: str, level: int) -> None:
    logger.log(level, message)
