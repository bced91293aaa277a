"""Launch configs: from a timed table of this GPU where there is one, else from the kernel's own heuristic.

A launch config is the tile sizes, number of warps and stages of one launch, and the backend where an operator has several.
Tables are looked up in the folder named by KEYE_KERNELS_TILES, in the user's cache, and in the package, in that order; then the
tables of GPUs with the same chip, in the same order. The first one with a matching entry is used. One JSON file holds one GPU:

    {"device": "NVIDIA H100 80GB HBM3", "triton": "3.9.0", "kernels": {"rope": [
     {"dtype": "bfloat16", "head_dim": 128, "tokens": 4096, "config": {"num_warps": 4}, "median_us": 9.1}]}}

The key of an entry (here dtype, head_dim, tokens) must match exactly, except for the sizes in BUCKETS: there the entry with the
nearest size is used, up to a ratio of MAX_BUCKET_RATIO.
"""

import json
import logging
import math
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from .device import chip_and_model, device_name

ConfigKey = dict[str, int | str]
Config = dict[str, int | str | bool]
TableEntry = dict[str, Any]  # a ConfigKey, its "config", and measured times

PACKAGE_TABLES = Path(__file__).parent / "tables"
BUCKETS = ("max_seqlen", "patches", "rows", "tokens")
# The fields of an entry that are not part of its key
NON_KEY_FIELDS = ("config", "median_us", "p20_us", "p80_us", "heuristic_us")
MAX_BUCKET_RATIO = 4
# What the fields of a config may be. Blocks are powers of two up to the largest of a kernel's candidates
MAX_BLOCK_SIZES = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 128, "BLOCK_T": 16, "BLOCK_H": 16, "BLOCK_C": 4096}
MIN_DOT_BLOCK_SIZE = 16  # of tl.dot
OTHER_FIELDS: dict[str, Any] = {"num_warps": (1, 2, 4, 8, 16), "num_stages": range(1, 9), "backend": ("triton", "torch")}

logger = logging.getLogger(__name__)
T = TypeVar("T")
_config_caches: list[Any] = []  # caches made by `cache_config`
_num_clears = 0


def launch_config(kernel: str, device: torch.device, key: ConfigKey, heuristic: Config) -> Config:
    """The config of one launch of a kernel. Each key is cached: round sizes that change with every call to powers of two.

    `heuristic` is the config where no table has an entry, and fills in the fields that an entry leaves out. A table that cannot
    be read or does not fit the kernel is reported once and ignored; this function never raises for it.
    """
    found = _look_up(kernel, device, tuple(key.items()))
    if found and (invalid := invalid_fields(found, heuristic)):
        names = ", ".join(invalid)
        log_once(f"ignoring a table entry of {kernel}: {found}; invalid: {names}; an example is {heuristic}", logging.WARNING)
        return heuristic
    return {**heuristic, **found} if found else heuristic


def invalid_fields(config: Config, heuristic: Config) -> list[str]:
    """The fields of a config whose name, type or value does not fit the kernel of this heuristic."""
    smallest = MIN_DOT_BLOCK_SIZE if "BLOCK_N" in heuristic else 1

    def is_valid(name: str, value: Any) -> bool:
        if name not in heuristic or type(value) is not type(heuristic[name]):
            return False
        if name in MAX_BLOCK_SIZES:
            return smallest <= value <= MAX_BLOCK_SIZES[name] and value & (value - 1) == 0
        return name not in OTHER_FIELDS or value in OTHER_FIELDS[name]

    return [name for name, value in config.items() if not is_valid(name, value)]


def save_entries(device: str, kernel: str, entries: list[TableEntry], folder: str | Path | None = None) -> Path:
    """Writes entries of one kernel into the table of a device (by name) and returns the table's path.

    An entry replaces one with the same key; entries of another Triton version are dropped. A lock file next to the table makes
    processes that write at the same time wait for each other. Raises OSError where a file cannot be written.
    """
    path = table_path(device, folder)
    with _lock(path.with_suffix(".lock")):
        _read.cache_clear()
        table = _read(path)
        kept = table["kernels"] if table and table["triton"] == triton_version() else {}
        keys = [entry_key(entry) for entry in entries]
        merged = [entry for entry in kept.get(kernel, []) if entry_key(entry) not in keys] + entries
        merged.sort(key=lambda entry: [(name, str(type(value)), value) for name, value in sorted(entry_key(entry).items())])
        write_atomically(path, to_json(device, {**kept, kernel: merged}))
    clear_cache()
    return path


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Waits for an exclusive lock of a file. The operating system releases it when the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)  # retries for ten seconds; closing the file releases it
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def to_json(device: str, kernels: dict[str, list[TableEntry]]) -> str:
    """A table as readable JSON, one entry per line."""
    parts = []
    for kernel, entries in sorted(kernels.items()):
        lines = ",\n".join(f"   {json.dumps(entry)}" for entry in entries)
        parts.append(f"  {json.dumps(kernel)}: [\n{lines}\n  ]")
    head = f' "device": {json.dumps(device)},\n "triton": {json.dumps(triton_version())},\n'
    return "{\n" + head + ' "kernels": {\n' + ",\n".join(parts) + "\n }\n}\n"


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file in one step: readers never see half of it. Raises OSError and leaves the old file where that fails."""
    with replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder. It replaces `path` after the block, or is deleted if the block raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.{threading.get_ident()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def table_path(device: str, folder: str | Path | None = None) -> Path:
    """The table of a device in `folder` (default: the first folder of the look-up)."""
    return Path(folder or table_folders()[0]) / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', device)}.json"


def table_folders() -> list[Path]:
    """The folders of the look-up, in order."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folders = [Path(cache_home) / "keye_kernels" / "tiles", PACKAGE_TABLES]
    named = os.environ.get("KEYE_KERNELS_TILES")
    return [Path(named), *folders] if named else folders


def table_paths(device: str) -> list[Path]:
    """Where the tables of a device (by name) are looked up, in order: its own, then those of other GPUs with the same chip."""
    own = [table_path(device, folder) for folder in table_folders()]
    siblings: list[tuple[bool, Path]] = []
    if (chip := chip_and_model(device)) is not None:
        for folder in table_folders():
            # A name with another dot is not a table: NAME.sweep.json, or a file that is being written
            for path in sorted(path for path in folder.glob("*.json") if "." not in path.stem and path not in own):
                other = chip_and_model(path.stem.replace("_", " "))
                if other is not None and other[0] == chip[0]:
                    siblings.append((other[1] != chip[1], path))
    return own + [path for _, path in sorted(siblings, key=lambda sibling: sibling[0])]  # a stable sort: the same model first


@cache
def triton_version() -> str:
    import triton  # not at the top: tables can be read and written before Triton decides to interpret or compile

    return triton.__version__


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """For instance "bfloat16", as tables have it."""
    return str(dtype).removeprefix("torch.")


def next_power_of_2(number: int) -> int:
    # triton.next_power_of_2 also takes constexprs, which makes it slow
    return 1 << (number - 1).bit_length() if number > 0 else 1


def cdiv(number: int, divisor: int) -> int:
    return -(-number // divisor)


def cache_config(function: Callable[..., T]) -> Callable[..., T]:
    """Caches what a launcher derives from a config, by its (hashable) arguments, until `clear_cache`."""
    cached = lru_cache(maxsize=4096)(function)
    _config_caches.append(cached)
    return cached


def clear_cache() -> None:
    """Tables are read again at the next launch."""
    global _num_clears
    _num_clears += 1
    for function in (_look_up, _read, *_config_caches):
        function.cache_clear()


def version() -> int:
    """Changes with every `clear_cache`: whatever depends on a config is valid for one version."""
    return _num_clears


@lru_cache(maxsize=4096)
def _look_up(kernel: str, device: torch.device, key: tuple[tuple[str, int | str], ...]) -> Config | None:
    name = device_name(device)
    paths = table_paths(name)
    for path in paths:
        table = _read(path)
        entry = _nearest(table["kernels"].get(kernel, []), dict(key)) if table else None
        if entry is None:
            continue
        log_once(f"{kernel} on {name}: launch configs from {path}{sibling_note(path, name)}", logging.INFO)
        if table["triton"].split(".")[:2] != triton_version().split(".")[:2]:
            versions = f"Triton {table['triton']}, this is {triton_version()}"
            log_once(f"{path} was measured with {versions}: run `keye-kernels autotune` to measure again", logging.WARNING)
        return entry["config"]
    log_once(f"{kernel} on {name}: launch configs from the heuristic; no entry in {paths[0]} and later tables", logging.INFO)
    return None


@cache
def _read(path: Path) -> dict[str, Any] | None:
    """A table after a check of its structure; None, with one warning, for a file that is not a table."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        for entries in table["kernels"].values():
            for entry in entries:
                fields = [*entry_key(entry).values(), *entry["config"].values()]
                if not all(isinstance(value, int | str) for value in fields):
                    raise ValueError(f"an entry has fields that are neither integers nor text: {entry}")
        table["triton"].split(".")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        log_once(f"ignoring launch-config table {path}: {type(error).__name__}: {error}", logging.WARNING)
        return None
    return table


def sibling_note(path: Path, device: str) -> str:
    """The end of a message: empty for a device's own table."""
    return "" if path.name == table_path(device).name else ", measured on another GPU with the same chip"


def entry_key(entry: TableEntry) -> ConfigKey:
    return {name: value for name, value in entry.items() if name not in NON_KEY_FIELDS}


def _nearest(entries: list[TableEntry], key: ConfigKey) -> TableEntry | None:
    buckets = [name for name in key if name in BUCKETS]
    candidates = [
        entry
        for entry in entries
        if entry_key(entry).keys() == key.keys()
        and all(entry[name] == key[name] for name in key if name not in BUCKETS)
        and all(isinstance(entry[name], int) for name in buckets)
    ]

    def distance(entry: TableEntry) -> float:
        return sum(abs(math.log2(max(entry[name], 1) / max(key[name], 1))) for name in buckets)

    nearest = min(candidates, key=distance, default=None)
    return nearest if nearest is not None and distance(nearest) <= math.log2(MAX_BUCKET_RATIO) else None


@cache
def log_once(message: str, level: int) -> None:
    logger.log(level, message)
