"""What a sweep has found so far, candidate by candidate, beside the table that it gives: NAME.sweep.json."""

import json
import logging
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from keye_kernels.triton import tiles
from keye_kernels.triton.tiles import Config

from .shapes import Shape

logger = logging.getLogger(__name__)


@dataclass
class Record:
    """One shape: of each candidate either three times or why it was rejected."""

    shape: Shape
    dtype: str
    timings: list[tuple[Config, list[float]]] = field(
        default_factory=list
    )  # microseconds: median, 20th, 80th percentile
    rejected: list[tuple[Config, str]] = field(default_factory=list)

    def knows(self, config: Config) -> bool:
        return any(config == known for known, _ in [*self.timings, *self.rejected])


class Records:
    """All records of one device with one set of versions; those of other versions are dropped."""

    def __init__(self, name: str, folder: str | Path | None):
        self.path = tiles.table_path(f"{name}.sweep", folder)
        self.head = {"device": name, "versions": _versions()}
        self.all = _read(self.path, self.head)

    def open(self, shape: Shape, dtype: str, resume: bool) -> Record:
        """The record of a shape: an empty one, or on `resume` what is known of it."""
        known = next((record for record in self.all if (record.shape, record.dtype) == (shape, dtype)), None)
        if known is None or not resume:
            if known is not None:
                self.all.remove(known)
            known = Record(shape, dtype)
            self.all.append(known)
        return known

    def save(self) -> None:
        """Raises OSError where the file cannot be written."""
        lines = ",\n".join(f"  {json.dumps(asdict(record))}" for record in self.all)
        head = json.dumps(self.head)[1:-1]
        tiles.write_whole(self.path, f'{{{head},\n "records": [\n{lines}\n ]\n}}\n')


def _read(path: Path, head: dict) -> list[Record]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["versions"] != head["versions"]:
            return []
        return [
            Record(
                Shape(**record["shape"]),
                record["dtype"],
                [(dict(config), [float(time) for time in times]) for config, times in record["timings"]],
                [(dict(config), str(why)) for config, why in record["rejected"]],
            )
            for record in found["records"]
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is ignored: %s: %s", path, type(error).__name__, error)
        return []


def _versions() -> dict[str, str]:
    try:
        own = version("keye_kernels")
    except PackageNotFoundError:  # run from a checkout
        own = "unknown"
    return {"keye_kernels": own, "torch": torch.__version__, "triton": tiles.triton_version()}
