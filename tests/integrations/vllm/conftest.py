import pytest

from .stubs import stubbed_models


@pytest.fixture
def models(monkeypatch):
    """The module of the plugin that needs vLLM, with stubs in place of vLLM's classes."""
    with stubbed_models(monkeypatch) as module:
        yield module
