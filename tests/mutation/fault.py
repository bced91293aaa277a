"""A fault: one edit of the package that the tests must detect."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path

from . import faults

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Fault:
    """Replaces `old`, which is in `file` exactly once, by `new`. `tests` are pytest arguments; one of these tests must fail."""

    file: str
    old: str
    new: str
    tests: str

    @property
    def name(self) -> str:
        line = next(number for number, text in enumerate(self.source().split("\n"), 1) if self.old.split("\n")[0] in text)
        return f"{self.file}:{line}"

    def source(self) -> str:
        return (ROOT / self.file).read_text()

    def apply(self, tree: Path) -> None:
        source = self.source()
        if source.count(self.old) != 1:
            raise ValueError(f"{self.file} has {source.count(self.old)} times, not once: {self.old!r}")
        (tree / self.file).write_text(source.replace(self.old, self.new))


def all_faults() -> list[Fault]:
    """The `FAULTS` of each module in `tests/mutation/faults`."""
    modules = [importlib.import_module(f"{faults.__name__}.{found.name}") for found in pkgutil.iter_modules(faults.__path__)]
    return [fault for module in modules for fault in module.FAULTS]
