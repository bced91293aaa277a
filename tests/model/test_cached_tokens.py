"""Tokens after a prompt attend to the cache in one operator where the kernels run and there are few of them, else with a mask."""

import pytest
import torch

from keye_kernels import ops
from keye_kernels.model import decoder
from tests.helpers.tiny import tiny_model

IDS = torch.randint(0, 100, (2, 40), generator=torch.Generator().manual_seed(0))
LAYERS = 2


@pytest.fixture
def called(monkeypatch):
    """The number of new tokens of each call of `cache_attention`."""
    lengths, run = [], ops.cache_attention
    monkeypatch.setattr(ops, "cache_attention", lambda *a, **k: lengths.append(len(a[4])) or run(*a, **k))
    return lengths


def logits(model, parts, impl, mask=None, max_length=64):
    """Of every part, all with one cache."""
    cache = model.new_cache(len(parts[0]), max_length)
    found, end = [], 0
    with torch.no_grad(), ops.use_impl(impl):
        for part in parts:
            end += part.shape[1]
            found.append(model(part, attention_mask=None if mask is None else mask[:, :end], cache=cache).logits)
    return found


@pytest.mark.parametrize("edition", ["Keye", "KeyeVL1_5"])
@pytest.mark.parametrize("padding", [None, "left"])
def test_the_logits_are_those_of_the_reference(edition, padding, called):
    model = tiny_model(model_type=edition)
    parts = IDS[:, :29].split([9, 1, 3, 16], dim=1)
    mask = torch.ones(2, 29, dtype=torch.int64)
    if padding:
        mask[1, :4] = 0
    expected = logits(model, parts, "reference", mask)
    assert called == []
    found = logits(model, parts, "triton", mask)
    assert called == [1] * LAYERS + [3] * LAYERS + [16] * LAYERS
    for one, other in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[0][:, 4:], expected[0][:, 4:], atol=1e-4, rtol=1e-4)


def test_padding_among_later_tokens():
    """A later turn of two sequences, the shorter one padded on the right."""
    model = tiny_model()
    parts = IDS[:, :14].split([9, 5], dim=1)
    mask = torch.ones(2, 14, dtype=torch.int64)
    mask[1, 12:] = 0
    found, expected = (logits(model, parts, impl, mask)[1] for impl in ("triton", "reference"))
    seen = mask[:, 9:].bool()
    torch.testing.assert_close(found[seen], expected[seen], atol=1e-4, rtol=1e-4)


def test_more_tokens_attend_with_a_mask(called):
    model = tiny_model()
    parts = IDS[:1, :37].split([9, 17, 11], dim=1)
    expected = logits(model, parts, "reference")
    found = logits(model, parts, "triton")
    assert called == [11] * LAYERS and decoder.MAX_NEW_TOKENS_OF_KERNEL == 16
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("condition", ["gradients", "autocast", "cache dtype", "reference", "auto"])
def test_otherwise_torch_attends_with_a_mask(condition, called):
    model, impl = tiny_model(), {"reference": "reference", "auto": "auto"}.get(condition, "triton")
    if condition == "cache dtype":
        model = model.half()
    cache = model.new_cache(1, 12)
    if condition == "cache dtype":
        cache.keys, cache.values = ([x.float() for x in part] for part in (cache.keys, cache.values))
    autocast = torch.autocast("cpu", enabled=condition == "autocast")
    with torch.set_grad_enabled(condition == "gradients"), ops.use_impl(impl), autocast:
        model(IDS[:1, :7], cache=cache)
        if condition == "cache dtype":
            with pytest.raises(RuntimeError, match="same dtype"):
                model(IDS[:1, 7:9], cache=cache)
        else:
            model(IDS[:1, 7:9], cache=cache)
    assert called == []


def test_a_call_that_failed_leaves_no_token_behind():
    model = tiny_model()
    expected = logits(model, IDS[:1, :12].split([9, 3], dim=1), "triton")[1]
    cache = model.new_cache(1, 64)
    with torch.no_grad(), ops.use_impl("triton"):
        model(IDS[:1, :9], cache=cache)
        handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(IDS[1:, :7], cache=cache)
        handle.remove()
        assert torch.equal(model(IDS[:1, 9:12], cache=cache).logits, expected)
