"""k and v are written into the cache by the launch that rotates them, where nothing else needs them; else as before."""

import pytest
import torch

from keye_kernels import ops
from keye_kernels.model.decoder import TextAttention
from tests.helpers.tiny import prompt, tiny_model

IDS = torch.randint(0, 100, (2, 7), generator=torch.Generator().manual_seed(0))
LAYERS = 2


@pytest.fixture
def called(monkeypatch):
    """The rope operators of the decoder that were called."""
    names = []
    for name in ("rope_3d", "rope_3d_to_cache"):
        run = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, run=run, name=name, **k: names.append(name) or run(*a, **k))
    return names


def bits(*calls, batch_size=1, mask=None, **changes):
    """Logits of all calls with one cache, and the cache."""
    model = tiny_model(**changes)
    cache = model.new_cache(batch_size, 64)
    with torch.no_grad(), ops.use_impl("triton"):
        logits = [model(**call, cache=cache).logits for call in calls]
    return [*logits, *cache.keys, *cache.values, cache.valid, cache.length, cache.rope_deltas]


CALLS = {
    "prompt and steps": ([prompt([(1, 4, 6)]), {"input_ids": IDS[:1, :1]}, {"input_ids": IDS[:1, 1:2]}], 1),
    "chunks": ([{"input_ids": part} for part in IDS[:1].split([4, 2, 1], dim=1)], 1),
    "padded prompt": ([{"input_ids": IDS[:1], "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1]])}], 1),
    "several sequences": ([{"input_ids": part} for part in IDS.split([4, 2, 1], dim=1)], 2),
}
# A prompt of several sequences cannot be read from the cache
EXPECTED = {"several sequences": ["rope_3d"] * LAYERS + ["rope_3d_to_cache"] * 2 * LAYERS}


@pytest.mark.parametrize("name", CALLS)
def test_the_bits_are_those_of_rope_and_two_copies(name, called, monkeypatch):
    calls, batch_size = CALLS[name]
    found = bits(*calls, batch_size=batch_size)
    assert called == EXPECTED.get(name, ["rope_3d_to_cache"] * LAYERS * len(calls))
    called.clear()
    monkeypatch.setattr(TextAttention, "_writes_with_rope", lambda *_: False)
    expected = bits(*calls, batch_size=batch_size)
    assert called == ["rope_3d"] * LAYERS * len(calls)
    assert all(map(torch.equal, found, expected))


def test_generation_gives_the_tokens_of_the_reference(called):
    model = tiny_model()
    expected = model.generate(IDS[:1], max_new_tokens=6, eos_token_id=())
    called.clear()
    with ops.use_impl("triton"):
        assert torch.equal(model.generate(IDS[:1], max_new_tokens=6, eos_token_id=()), expected)
    assert called == ["rope_3d_to_cache"] * LAYERS * 6


@pytest.mark.parametrize("condition", ["gradients", "autocast", "cache dtype", "no cache", "float64", "reference", "auto"])
def test_otherwise_rope_and_two_copies_run(condition, called):
    model, impl = tiny_model(), {"reference": "reference", "auto": "auto"}.get(condition, "triton")
    cache = model.new_cache(1, 9)
    if condition == "cache dtype":
        cache.keys, cache.values = ([x.half() for x in part] for part in (cache.keys, cache.values))
    if condition == "float64":
        model, impl = model.double(), "reference"
        cache = model.new_cache(1, 9)
    autocast = torch.autocast("cpu", enabled=condition == "autocast")
    with torch.set_grad_enabled(condition == "gradients"), ops.use_impl(impl), autocast:
        if condition == "no cache":
            model.model(model.model.embed_tokens(IDS[:1]), torch.arange(7).expand(3, 1, 7), torch.ones(1, 7).long(), None)
        else:
            model(IDS[:1], cache=cache)
    assert called == ["rope_3d"] * LAYERS
    assert condition == "no cache" or all((x[0, :7] != 0).any() and (x[0, 7:] == 0).all() for x in (*cache.keys, *cache.values))


def test_a_prompt_after_a_prompt_that_failed_starts_at_slot_0():
    model, cache = tiny_model(), None
    expected = bits({"input_ids": IDS[:1]})
    cache = model.new_cache(1, 64)
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with torch.no_grad(), ops.use_impl("triton"):
        with pytest.raises(ZeroDivisionError):
            model(IDS[1:], cache=cache)
        handle.remove()
        found = model(IDS[:1], cache=cache).logits
    assert all(map(torch.equal, [found, *cache.keys, *cache.values], expected[: 1 + 2 * LAYERS]))
