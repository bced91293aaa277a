"""The report of `apply_keye_kernels`: what was replaced and what was left alone, module by module."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

Part = Literal["rope", "attention", "projector", "elementwise"]


@dataclass(frozen=True)
class ModuleReport:
    """What happened to one part of one module.

    `module` is its name in `named_modules()`. `note` is the operator that runs now, or the reason why the part was left alone.
    `missing`: the part was requested but does not run this package's operators; `strict=True` raises for these.
    """

    module: str
    class_name: str
    part: Part
    note: str
    missing: bool = False


@dataclass(frozen=True)
class PatchReport:
    """Result of `apply_keye_kernels`. `print(report)` groups modules with the same result.

    Used as a context manager, it reverts the changes of its own call at the end of the block.

    Attributes:
        model: class name of the model.
        replaced: the parts that run this package's operators now.
        left_alone: the parts that do not, with the reasons.
    """

    model: str
    replaced: tuple[ModuleReport, ...]
    left_alone: tuple[ModuleReport, ...]
    _undo: Callable[[], None] = field(repr=False, compare=False)

    def __enter__(self) -> "PatchReport":
        return self

    def __exit__(self, *error: object) -> None:
        self._undo()

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.replaced) or 'nothing'} replaced, {len(self.left_alone)} left alone"]
        for title, reports in (("replaced", self.replaced), ("left alone", self.left_alone)):
            if reports:
                lines += [f"  {title}:", *(f"    {line}" for line in grouped_lines(reports))]
        return "\n".join(lines)


def grouped_lines(reports: Iterable[ModuleReport]) -> list[str]:
    """One line per group of modules with names that differ only in numbers, such as "visual.blocks.*.attn (x32): ..."."""
    groups = Counter((re.sub(r"\b\d+\b", "*", item.module), item.class_name, item.part, item.note) for item in reports)
    return [
        f"{name or '(the model itself)'} {class_name} (x{count}), {part}: {note}"
        for (name, class_name, part, note), count in groups.items()
    ]
