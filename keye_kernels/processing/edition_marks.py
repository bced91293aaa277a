"""Marks the images and videos that `process_vision_info` returns, so that a processor of the other edition rejects them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from keye_kernels.editions import EditionName

_ATTRIBUTE = "_keye_edition"


class _FrameList(list):
    """A list of frames that can have attributes."""


def mark_edition(item: Any, edition: EditionName) -> Any:
    """Returns an image, a tensor or a list of frames marked with the edition."""
    marked = _FrameList(item) if isinstance(item, list) else item
    setattr(marked, _ATTRIBUTE, edition)
    return marked


def is_marked(items: Iterable[Any]) -> bool:
    """Returns whether one of the images or videos comes from `process_vision_info`."""
    return any(hasattr(item, _ATTRIBUTE) for item in items)


def check_edition(edition: EditionName, **inputs: Iterable[Any]) -> None:
    """Raises ValueError for images or videos that were loaded for another edition, which samples and resizes differently."""
    for name, items in inputs.items():
        for item in items:
            found = getattr(item, _ATTRIBUTE, edition)
            if found != edition:
                raise ValueError(
                    f"{name} were loaded by process_vision_info with edition={found!r}, and this checkpoint is of edition "
                    f"{edition!r}; call process_vision_info with edition={edition!r}"
                )
