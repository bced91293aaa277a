"""Registration with the Auto classes, and the supported versions of transformers."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import keye_kernels.integrations.transformers as integration
from keye_kernels.integrations.transformers import register, register_processors
from keye_kernels.integrations.transformers.versions import require_transformers
from tests.helpers.imports import imported_modules

BLOCKED = """
import importlib.metadata, sys
real = importlib.metadata.version
def version(name):
    if name == "transformers":
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
sys.modules["transformers"] = None
import keye_kernels.auto
"""


def test_registration_can_be_repeated():
    register()
    register_processors()


def test_missing_transformers_error_shows_the_install_command():
    result = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=120, check=False)
    expected = 'keye_kernels.auto needs transformers, which is not installed: pip install "transformers>=4.57"'
    assert result.stderr.strip().splitlines()[-1] == f"ImportError: {expected}"


@pytest.mark.parametrize("version", ["4.51.3", "4.9", "4.56.0.dev0"])
def test_old_transformers_is_rejected(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(ImportError, match=rf"needs transformers 4.57 or newer, found {version}: pip install"):
        require_transformers()


@pytest.mark.parametrize("version", ["4.57.6", "5.0.0rc1", "5.23.0", "6.0.dev1"])
def test_newer_transformers_is_accepted(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    require_transformers()


def test_processors_do_not_import_the_model():
    """vLLM registers configurations and processors in each of its processes."""
    for name in ("config", "image_processing", "processing", "versions"):
        imported = imported_modules(Path(integration.__file__).with_name(f"{name}.py"))
        for model in ("attention", "generation", "modeling", "pretrained", "text", "vision"):
            assert f"{integration.__name__}.{model}" not in imported, (name, model)
