"""Which tile a kernel uses: a table measured on this device where there is one, the kernel's own heuristic elsewhere.

Tables are looked for in the folder named by KEYE_KERNELS_TILES, in the user's cache, and in the package, in that order;
the first that has an entry for the case serves. One JSON file holds one kernel on one device:

    {"device": "NVIDIA H100 80GB HBM3", "entries": [{"config": {"num_warps": 4}, "dtype": "bfloat16", "median_us": 9.1,
     "tokens": 4096}], "kernel": "rope", "triton": "3.9.0"}

Text fields of a case must match an entry's exactly, integer fields choose the nearest bucket by ratio.
"""

import json
import logging
import math
import os
import re
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

Case = dict[str, int | str]
Config = dict[str, int | str | bool]

PACKAGE_TABLES = Path(__file__).parent / "tables"
RESULTS = ("config", "median_us")  # the fields of an entry that are no part of its case

logger = logging.getLogger(__name__)


def tile(kernel: str, device: torch.device, key: Case, heuristic: Config) -> Config:
    """The configuration for one launch.

    Args:
        kernel: the kernel's name, which is the table's.
        device: where it runs.
        key: what the choice depends on; let integers that vary with every call be buckets, since each case is kept.
        heuristic: the configuration where no table has an entry; the fields that an entry leaves out come from it too.

    Never raises for what a table holds: a file that cannot be read is reported once and passed over.
    """
    found = _look_up(kernel, device, tuple(key.items()))
    return {**heuristic, **found} if found else heuristic


def save(
    kernel: str, device: torch.device, key: Case, config: Config, median_us: float, folder: str | Path | None = None
) -> Path:
    """Writes one measured entry into the table in `folder` (default: first place of the look-up); returns its path.

    The entry replaces one of the same case. Entries of another Triton version are dropped: a table names one.
    The file is replaced as a whole, so that a reader never meets half of it.
    """
    path = Path(folder or _folders()[0]) / _file_name(kernel, _device_name(device))
    _read.cache_clear()
    table = _read(path)
    entries = table["entries"] if table and table["triton"] == _triton_version() else []
    entries = [entry for entry in entries if _case(entry) != key]
    entries.append({**key, "config": config, "median_us": median_us})
    entries.sort(key=lambda entry: [(name, str(type(value)), value) for name, value in sorted(_case(entry).items())])
    table = {"device": _device_name(device), "triton": _triton_version(), "kernel": kernel, "entries": entries}

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    _read.cache_clear()
    _look_up.cache_clear()
    return path


def clear_cache() -> None:
    """Forgets what was looked up and reported: tables are read again at the next launch."""
    for function in (_look_up, _read, _report, _device_name):
        function.cache_clear()


@lru_cache(maxsize=4096)
def _look_up(kernel: str, device: torch.device, key: tuple[tuple[str, int | str], ...]) -> Config | None:
    name = _device_name(device)
    paths = [folder / _file_name(kernel, name) for folder in _folders()]
    for path in paths:
        table = _read(path)
        entry = _nearest(table["entries"], dict(key)) if table else None
        if entry is not None:
            _report(f"{kernel} on {name}: tiles from {path}", logging.INFO)
            if _release(table["triton"]) != _release(_triton_version()):
                _report(
                    f"{path} was measured with Triton {table['triton']}, this is {_triton_version()}: "
                    "run `keye-kernels autotune` to measure again",
                    logging.WARNING,
                )
            return entry["config"]
    _report(f"{kernel} on {name}: tiles from the heuristic; a table would be read from {paths[0]}", logging.INFO)
    return None


def _folders() -> list[Path]:
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folders = [Path(cache_home) / "keye_kernels" / "tiles", PACKAGE_TABLES]
    named = os.environ.get("KEYE_KERNELS_TILES")
    return [Path(named), *folders] if named else folders


def _file_name(kernel: str, device_name: str) -> str:
    return f"{kernel}.{re.sub(r'[^A-Za-z0-9.-]+', '_', device_name)}.json"


@cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def _triton_version() -> str:
    import triton  # late: reading and writing tables works without it being chosen to interpret or to compile

    return triton.__version__


def _release(version: str) -> list[str]:
    return version.split(".")[:2]


@cache
def _read(path: Path) -> dict[str, Any] | None:
    """A table whose shape was checked; None, with one warning, for a file that holds none."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        for entry in table["entries"]:
            fields = [*_case(entry).values(), *entry["config"].values()]
            if not all(isinstance(value, int | str) for value in fields):
                raise ValueError(f"an entry has fields that are neither integers nor text: {entry}")
        table["triton"].split(".")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _report(f"tile table {path} is ignored: {type(error).__name__}: {error}", logging.WARNING)
        return None
    return table


def _case(entry: dict[str, Any]) -> Case:
    return {name: value for name, value in entry.items() if name not in RESULTS}


def _nearest(entries: list[dict[str, Any]], key: Case) -> dict[str, Any] | None:
    text = {name for name, value in key.items() if isinstance(value, str)}
    integers = key.keys() - text
    candidates = [
        entry
        for entry in entries
        if _case(entry).keys() == key.keys()
        and all(entry[name] == key[name] for name in text)
        and all(isinstance(entry[name], int) for name in integers)
    ]

    def distance(entry: dict[str, Any]) -> float:
        return sum(abs(math.log2(max(entry[name], 1) / max(key[name], 1))) for name in integers)

    return min(candidates, key=distance, default=None)


@cache
def _report(message: str, level: int) -> None:
    logger.log(level, message)
