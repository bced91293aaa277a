"""The times of a sweep, candidate by candidate, saved next to its table as NAME.sweep.json."""

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from keye_kernels import __version__
from keye_kernels.triton.launch_config import Config, table_path, triton_version, write_atomically
from keye_kernels.triton.spec import TuningShape

logger = logging.getLogger(__name__)


@dataclass
class SweepRecord:
    """One shape: for each candidate either its times, or why it was rejected."""

    shape: TuningShape
    dtype: str
    timings: list[tuple[Config, list[float]]] = field(default_factory=list)  # microseconds: median, 20th, 80th percentile
    rejected: list[tuple[Config, str]] = field(default_factory=list)

    def knows(self, config: Config) -> bool:
        return any(config == known for known, _ in [*self.timings, *self.rejected])

    def has_time(self, config: Config) -> bool:
        return any(config == known for known, _ in self.timings)

    def time(self, config: Config, times_ms: list[float]) -> None:
        """Adds the times of a config, or replaces them."""
        timing = config, [round(1000 * time, 2) for time in times_ms]
        for index, (known, _) in enumerate(self.timings):
            if known == config:
                self.timings[index] = timing
                return
        self.timings.append(timing)

    def by_time(self) -> list[tuple[Config, list[float]]]:
        """The timings, the fastest first."""
        return sorted(self.timings, key=lambda timing: timing[1][0])


class SweepRecords:
    """All records of one device and one set of versions. Those of other versions are dropped."""

    def __init__(self, name: str, folder: str | Path | None):
        self.path = table_path(f"{name}.sweep", folder)
        self.head = {"device": name, "versions": _versions()}
        self.all = _read(self.path, self.head)

    def find(self, shape: TuningShape, dtype: str) -> SweepRecord | None:
        return next((record for record in self.all if (record.shape, record.dtype) == (shape, dtype)), None)

    def open(self, shape: TuningShape, dtype: str, resume: bool) -> SweepRecord:
        """The record of a shape: an empty one, or with `resume` the saved one."""
        known = self.find(shape, dtype)
        if known and resume:
            return known
        if known:
            self.all.remove(known)
        self.all.append(SweepRecord(shape, dtype))
        return self.all[-1]

    def save(self) -> None:
        """Raises OSError where the file cannot be written."""
        lines = ",\n".join(f"  {json.dumps(asdict(record))}" for record in self.all)
        head = json.dumps(self.head)[1:-1]
        write_atomically(self.path, f'{{{head},\n "records": [\n{lines}\n ]\n}}\n')


def _read(path: Path, head: dict) -> list[SweepRecord]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["versions"] != head["versions"]:
            return []
        return [
            SweepRecord(
                TuningShape(**record["shape"]),
                record["dtype"],
                [(dict(config), [float(time) for time in times]) for config, times in record["timings"]],
                [(dict(config), str(why)) for config, why in record["rejected"]],
            )
            for record in found["records"]
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("ignoring %s: %s: %s", path, type(error).__name__, error)
        return []


def _versions() -> dict[str, str]:
    return {"keye_kernels": __version__, "torch": torch.__version__, "triton": triton_version()}
