"""Records the calls of this package's operators."""

from functools import partial

import pytest

import keye_kernels as kk

OPERATORS = ("position_embedding_2d", "rope_2d", "rope_3d", "varlen_attention", "patch_merge_projection")


@pytest.fixture
def operator_calls(monkeypatch):
    """A list of (name, arguments, keyword arguments) of every later call by a model. The operators run with impl="auto"."""
    calls = []
    for name in OPERATORS:
        monkeypatch.setattr(kk.ops, name, partial(_record, calls, name, getattr(kk.ops, name)))
    return calls


def _record(calls, name, operator, *arguments, **options):
    calls.append((name, arguments, options))
    return operator(*arguments, **{**options, "impl": "auto"})
