"""Linear layers of few rows run as the kernel `linear_few_rows` where a table of launch configs chooses it, else as modules."""

import pytest
import torch

from keye_kernels import ops
from keye_kernels.triton import launch_config
from keye_kernels.triton import linear_few_rows as kernel
from tests.helpers.tiny import tiny_model

IDS = torch.randint(0, 100, (1, 20), generator=torch.Generator().manual_seed(0))
LAYERS = 2
LAYER = ["linear", "linear", "silu_mul", "residual"]  # qkv, o, gate and up, down
EVERY = LAYER * LAYERS + ["linear"]  # the head


@pytest.fixture
def in_table(monkeypatch):
    """As if a table had `backend: triton` for every size."""
    choice = kernel.heuristic
    monkeypatch.setattr(kernel, "heuristic", lambda *shape: choice(*shape) | {"backend": "triton"})
    launch_config.clear_cache()
    yield
    monkeypatch.undo()
    launch_config.clear_cache()


@pytest.fixture
def called(monkeypatch):
    """The epilogue of each call of the operator."""
    names, run = [], ops.linear_few_rows

    def record(x, weight, bias=None, *, residual=None, silu_mul=False, impl="auto"):
        names.append("silu_mul" if silu_mul else "linear" if residual is None else "residual")
        return run(x, weight, bias, residual=residual, silu_mul=silu_mul, impl=impl)

    monkeypatch.setattr(ops, "linear_few_rows", record)
    return names


def logits(model, *lengths, impl="triton"):
    """Of a prompt and later chunks, in one cache."""
    cache = model.new_cache(1, 64)
    with torch.no_grad(), ops.use_impl(impl):
        return [model(part, cache=cache).logits for part in IDS[:, : sum(lengths)].split(lengths, dim=1)]


def test_a_step_runs_every_linear_layer_as_the_kernel(in_table, called):
    model = tiny_model()
    found = logits(model, 17, 1, 2)
    assert called == EVERY * 2, "a prompt of 17 tokens has too many rows"
    called.clear()
    for one, other in zip(found, logits(model, 17, 1, 2, impl="reference"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert not called


def test_without_a_table_the_modules_are_called(called):
    logits(tiny_model(), 3, 1)
    assert not called


def test_on_a_cpu_auto_calls_the_modules(in_table, called):
    logits(tiny_model(), 3, 1, impl="auto")
    assert not called


@pytest.mark.parametrize("name", ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"])
def test_a_layer_with_a_hook_is_called(name, in_table, called):
    model, ran = tiny_model(), []
    for module in (module for path, module in model.named_modules() if path.endswith(name)):
        module.register_forward_hook(lambda *_: ran.append(name))
    assert torch.isfinite(logits(model, 1)[0]).all()
    missing = 1 if name == "lm_head" else LAYERS
    assert len(ran) == missing and len(called) == len(EVERY) - missing


def test_generation_gives_the_tokens_of_the_reference(in_table, called):
    model = tiny_model()
    expected = model.generate(IDS[:, :5], max_new_tokens=4, eos_token_id=())
    with ops.use_impl("triton"):
        assert torch.equal(model.generate(IDS[:, :5], max_new_tokens=4, eos_token_id=()), expected)
    assert len(called) >= 4 * len(EVERY)
