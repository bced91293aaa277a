"""Records the calls of this package's operators."""

import pytest

import keye_kernels as kk

OPERATORS = ("position_embedding_2d", "rope_2d", "rope_3d", "varlen_attention", "patch_merge_projection")


@pytest.fixture
def operator_calls(monkeypatch):
    """A list of (name, arguments, keyword arguments) of every later call by a model. The operators run with impl="auto"."""
    calls = []
    for name in OPERATORS:

        def record(*arguments, name=name, operator=getattr(kk.ops, name), **options):
            calls.append((name, arguments, options))
            return operator(*arguments, **{**options, "impl": "auto"})

        monkeypatch.setattr(kk.ops, name, record)
    return calls
