import importlib
import sys

import pytest

from keye_kernels.integrations import vllm as plugin

from .stubs import stub_modules

MODELS = "keye_kernels.integrations.vllm.models"


@pytest.fixture
def models(monkeypatch):
    """The module of the plugin that needs vLLM, with stubs in place of vLLM's classes."""
    for name, module in stub_modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, MODELS, raising=False)
    module = importlib.import_module(MODELS)
    yield module
    sys.modules.pop(MODELS, None)
    del plugin.models
