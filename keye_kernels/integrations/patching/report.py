"""What `apply_keye_kernels` did and did not do, module by module."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

Part = Literal["rope", "attention", "projector"]


@dataclass(frozen=True)
class Entry:
    """One part of one module: which operator runs it now (`replaced`), or why not (`left_alone`).

    `missing`: it was asked for and does not run this package's operators; `strict` is about these.
    """

    module: str
    class_name: str
    part: Part
    note: str
    missing: bool = False


@dataclass(frozen=True)
class PatchReport:
    """The result of `apply_keye_kernels`; printed, it groups modules that fared alike.

    As a context manager it takes back, at the end of the block, what its own call changed.
    """

    model: str
    replaced: tuple[Entry, ...]
    left_alone: tuple[Entry, ...]
    _undo: Callable[[], None] = field(repr=False, compare=False)

    def __enter__(self) -> "PatchReport":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._undo()

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.replaced)} replaced, {len(self.left_alone)} left alone"]
        if not self.replaced:
            lines = [f"{self.model}: nothing replaced, {len(self.left_alone)} left alone"]
        for title, entries in (("replaced", self.replaced), ("left alone", self.left_alone)):
            if entries:
                lines += [f"  {title}:", *(f"    {line}" for line in grouped(entries))]
        return "\n".join(lines)


def grouped(entries: tuple[Entry, ...]) -> list[str]:
    """One line for the modules that differ in the numbers of their names only: "visual.blocks.*.attn (x32): ..."."""
    groups: dict[tuple[str, ...], int] = {}
    for entry in entries:
        key = (re.sub(r"\b\d+\b", "*", entry.module), entry.class_name, entry.part, entry.note)
        groups[key] = groups.get(key, 0) + 1
    return [
        f"{name or '(the model itself)'} {class_name} (x{count}), {part}: {note}"
        for (name, class_name, part, note), count in groups.items()
    ]
