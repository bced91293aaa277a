"""Caches that grow: how large they are, that growth changes no result, and that a generation pays only for its tokens."""

import pytest
import torch

from keye_kernels.model import generation
from keye_kernels.model.cache import CACHE_BLOCK_TOKENS, KVCache
from tests.helpers.tiny import prompt, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def small_blocks(monkeypatch):
    """Caches of at least 4 slots."""
    monkeypatch.setattr("keye_kernels.model.cache.CACHE_BLOCK_TOKENS", 2)


@pytest.fixture
def sizes(monkeypatch):
    """The number of slots after each growth."""
    found, grow = [], KVCache._grow
    monkeypatch.setattr(KVCache, "_grow", lambda cache, slots: found.append(slots) or grow(cache, slots))
    return found


def test_a_new_cache_is_small_and_doubles(model, sizes):
    cache = model.new_cache(1)
    ids = torch.randint(0, 100, (1, 1300), generator=torch.Generator().manual_seed(0))
    assert cache.max_length == 2 * CACHE_BLOCK_TOKENS == 512 and cache.grows and not model.new_cache(1, 8).grows
    with torch.no_grad():
        for part in ids.split([512, 1, 511, 276], dim=1):
            found = model(part, cache=cache).logits
        assert sizes == [1024, 2048] and cache.max_length == 2048
        torch.testing.assert_close(found, model(ids).logits[:, -276:], atol=1e-4, rtol=1e-4)
    assert int(cache.length) == cache.count == 1300 and not cache.valid[:, 1300:].any()
    assert all(x.shape == (1, 2048, 2, 32) and x.is_contiguous() and not x[:, 1300:].any() for x in (*cache.keys, *cache.values))


def test_steps_and_later_turns_in_a_growing_cache_equal_those_in_a_large_one(model, small_blocks, sizes):
    calls = (
        prompt([(1, 2, 4)], lead=1),
        *[{"input_ids": torch.tensor([[token]])} for token in (5, 6, 7)],
        prompt([(1, 4, 4)], seed=1),
    )
    with torch.no_grad():
        small, large = model.new_cache(1), model.new_cache(1, 64)
        assert small.max_length == 4
        for call in calls:
            assert torch.equal(model(**call, cache=small).logits.argmax(-1), model(**call, cache=large).logits.argmax(-1))
    used = int(large.length)
    assert sizes and used <= small.max_length < 2 * used + 4 and torch.equal(small.rope_deltas, large.rope_deltas)
    for one, other in zip(small.keys + small.values, large.keys + large.values, strict=True):
        torch.testing.assert_close(one[:, :used], other[:, :used], atol=1e-5, rtol=1e-5)


def test_a_generation_allocates_for_its_tokens_and_not_for_the_limit(model, sizes, monkeypatch):
    caches = []
    monkeypatch.setattr(generation, "KVCache", lambda *a, **k: caches.append(KVCache(*a, **k)) or caches[-1])
    ids = torch.tensor([[1, 2, 3]])
    ends = model.generate(ids, max_new_tokens=4, eos_token_id=())[0, -1].item()
    model.generate(ids, max_new_tokens=1900, eos_token_id=ends)
    assert caches[-1].max_length == 512 and sizes == []
    model.generate(ids, max_new_tokens=5, eos_token_id=())
    assert caches[-1].max_length == 8


@pytest.mark.parametrize("limit", [3, 9, 20])
def test_a_generation_that_grows_gives_the_same_tokens(model, small_blocks, sizes, limit, monkeypatch):
    inputs = prompt([(1, 2, 4)])
    length = inputs["input_ids"].shape[1]
    batch = {
        "input_ids": torch.tensor([[0, 0, 1, 2], [3, 4, 5, 6]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
    }
    found = [model.generate(**call, max_new_tokens=limit, eos_token_id=()) for call in (inputs, batch)]
    assert all(slots <= max(length, 4) + limit for slots in sizes) and bool(sizes) == (limit > 3)
    monkeypatch.setattr("keye_kernels.model.cache.CACHE_BLOCK_TOKENS", 256)
    sizes.clear()
    for call, tokens in zip((inputs, batch), found, strict=True):
        assert torch.equal(model.generate(**call, max_new_tokens=limit, eos_token_id=()), tokens) and sizes == []


def test_growth_holds_one_layer_twice_at_most(model, monkeypatch):
    """Tensors of replaced layers are freed before the next ones are allocated."""
    import weakref

    cache = KVCache(model.config, 1, 8, torch.float32, torch.device("cpu"), grows=True)
    old = [weakref.ref(x) for x in (*cache.keys, *cache.values)]
    alive, new_zeros = [], torch.Tensor.new_zeros

    def count(x, *shape):
        alive.append(sum(ref() is not None for ref in old))
        return new_zeros(x, *shape)

    monkeypatch.setattr(torch.Tensor, "new_zeros", count)
    cache.reserve(1, 9)
    assert alive == [4, 2, 0]  # two layers, then `valid`


def test_a_cache_grows_in_and_out_of_inference_mode(model, small_blocks):
    ids = torch.randint(0, 100, (1, 18), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(1)
    found = []
    for index, part in enumerate(ids.split([6, 2, 8, 2], dim=1)):
        with torch.inference_mode(index % 2 == 0), torch.set_grad_enabled(False):
            found.append(model(part, cache=cache).logits.clone())
    torch.testing.assert_close(torch.cat(found, dim=1), model(ids).logits, atol=1e-5, rtol=1e-5)
    assert not any(x.requires_grad for x in (*cache.keys, *cache.values))


def test_a_cache_of_given_size_does_not_grow(model):
    cache = model.new_cache(1, 4)
    model(torch.tensor([[1, 2, 3]]), cache=cache)
    with pytest.raises(ValueError, match="cache has 4 slots per sequence, 3 of them used: 2 more tokens do not fit"):
        model(torch.tensor([[4, 5]]), cache=cache)
    assert cache.max_length == 4


def test_on_a_gpu_the_cpu_counts_the_slots(model):
    """Reading the length would wait."""
    cache = model.new_cache(1, 4)

    class OnGpu(torch.Tensor):
        device = torch.device("cuda")

        def __int__(self):
            raise AssertionError("waits for the GPU")

    cache.length = cache.length.as_subclass(OnGpu)
    cache.advance(3)
    cache.reserve(1, 1)
    with pytest.raises(ValueError, match="3 of them used: 2 more tokens do not fit"):
        cache.reserve(1, 2)
    cache.clear()
    cache.reserve(1, 4)
