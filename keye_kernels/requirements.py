"""Supported versions of other packages, read from this package's own metadata. Imports nothing of the package."""

import importlib.metadata
import re
from typing import NamedTuple

DISTRIBUTION = "keye_kernels"
# A bound such as `>=4.57` or `<5.24`
_BOUND = re.compile(r"(>=|<)\s*([\d.]+)")


class VersionRange(NamedTuple):
    """Supported versions: `oldest` and newer, and older than `below`. None: no bound."""

    oldest: str | None
    below: str | None


def supported_versions(name: str) -> VersionRange:
    """The supported versions of a package that keye_kernels requires, from the metadata of keye_kernels.

    Raises LookupError if it does not require `name`, and PackageNotFoundError if keye_kernels itself is not installed.
    """
    for entry in importlib.metadata.requires(DISTRIBUTION) or ():
        requirement = entry.partition(";")[0].strip()
        if re.split(r"[^\w.-]", requirement, maxsplit=1)[0] == name:
            bounds = dict(_BOUND.findall(requirement))
            return VersionRange(bounds.get(">="), bounds.get("<"))
    raise LookupError(f"{DISTRIBUTION} does not require {name}")


def require(name: str, *, needed_by: str, distributions: tuple[str, ...] = ()) -> None:
    """Raises ImportError, with the command that fixes it, if a package is missing or too old. `needed_by` is for the message.

    `distributions` are the names under which the package is published, if there are several.
    """
    oldest = supported_versions(name).oldest
    command = f'pip install "{name}>={oldest}"'
    installed = next(filter(None, map(_installed_version, distributions or (name,))), None)
    if installed is None:
        raise ImportError(f"{needed_by} needs {name}, which is not installed: {command}")
    if oldest and _major_minor(installed) < _major_minor(oldest):
        raise ImportError(f"{needed_by} needs {name} {oldest} or newer, found {installed}: {command}")


def _installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _major_minor(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
