"""Calls of the model: exact sizes, padding on the right, given positions, and what generation computes."""

import pytest
import torch

import keye_kernels as kk
from keye_kernels.model import generation
from keye_kernels.model.cache import CACHE_BLOCK_TOKENS
from keye_kernels.model.generation import Sampler
from tests.helpers.tiny import prompt, tiny_model

EXACT = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def ids():
    return torch.randint(0, 100, (1, 6), generator=torch.Generator().manual_seed(0))


def test_a_cache_can_be_filled_completely(model, ids):
    expected = model(ids).logits
    cache = model.new_cache(1, 6)
    found = torch.cat([model(part, cache=cache).logits for part in ids.split([3, 2, 1], dim=1)], dim=1)
    torch.testing.assert_close(found, expected, **EXACT)
    with pytest.raises(ValueError, match="6 of them used: 1 more tokens do not fit"):
        model(ids[:, :1], cache=cache)


@pytest.mark.parametrize("length", [1, CACHE_BLOCK_TOKENS - 1, CACHE_BLOCK_TOKENS, CACHE_BLOCK_TOKENS + 1])
def test_the_default_cache_has_room_for_a_block_of_tokens(model, length):
    slots = model(torch.ones(1, length, dtype=torch.int64)).cache.max_length
    assert slots % CACHE_BLOCK_TOKENS == 0 and CACHE_BLOCK_TOKENS <= slots - length <= 2 * CACHE_BLOCK_TOKENS == 512


def test_a_cache_holds_no_graph(model, ids):
    cache = model(ids).cache
    assert not any(x.requires_grad for x in (*cache.keys, *cache.values))


def test_generation_can_use_every_position_of_the_model(ids):
    model = tiny_model(max_position_embeddings=9)
    assert model.generate(ids, max_new_tokens=3).shape == (1, 9)
    with pytest.raises(ValueError, match="6 prompt tokens and 4 new tokens exceed the model's 9 positions"):
        model.generate(ids, max_new_tokens=4)


def test_one_sequence_padded_on_the_right_is_refused_for_generation(model):
    with pytest.raises(ValueError, match="attention_mask must pad on the left"):
        model.generate(torch.ones(2, 3, dtype=torch.int64), torch.tensor([[1, 1, 1], [1, 1, 0]]))


def test_right_padded_batch_and_its_next_tokens_equal_single_sequences(model):
    sequences = [prompt([(1, 4, 4)], seed=1), prompt([(1, 2, 4), (1, 2, 2)], lead=5, seed=2)]
    width = 3 + max(sequence["input_ids"].shape[1] for sequence in sequences)
    ids, mask = torch.zeros(2, width, dtype=torch.int64), torch.zeros(2, width, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        tokens = sequence["input_ids"][0]
        ids[row, 1 : 1 + len(tokens)], mask[row, 1 : 1 + len(tokens)] = tokens, 1
    media = {name: torch.cat([sequence[name] for sequence in sequences]) for name in ("pixel_values", "image_grid_thw")}
    token = torch.tensor([[5], [6]])
    output = model(ids, mask, **media)
    steps = model(token, cache=output.cache).logits, model(token + 1, cache=output.cache).logits
    for row, sequence in enumerate(sequences):
        alone = model(**sequence)
        torch.testing.assert_close(output.logits[row][mask[row].bool()], alone.logits[0], **EXACT)
        for step, found in enumerate(steps):
            expected = model(token[row : row + 1] + step, cache=alone.cache).logits
            torch.testing.assert_close(found[row : row + 1], expected, **EXACT)


def test_given_positions_are_used_for_these_tokens(model, ids):
    positions = torch.arange(6).expand(3, 1, 6)
    expected = model(ids).logits
    assert torch.equal(model(ids, position_ids=positions).logits, expected)
    # Attention depends only on differences of positions
    torch.testing.assert_close(model(ids, position_ids=positions + 7).logits, expected, atol=1e-4, rtol=1e-4)
    for axis in range(3):
        scaled = positions.clone()
        scaled[axis] *= 3
        assert (model(ids, position_ids=scaled).logits - expected).abs().max() > 1e-3, axis


def test_given_positions_are_used_in_a_later_call(model, ids):
    cache = model(ids[:, :4]).cache
    found = model(ids[:, 4:], position_ids=torch.tensor([9, 10]).expand(3, 1, 2), cache=cache).logits
    positions = torch.tensor([0, 1, 2, 3, 9, 10]).expand(3, 1, 6)
    torch.testing.assert_close(found, model(ids, position_ids=positions).logits[:, 4:], **EXACT)


def test_a_block_of_1_5_may_begin_in_another_call_than_its_start_token():
    model, inputs = tiny_model(model_type="KeyeVL1_5"), prompt([(1, 2, 4)])
    ids = inputs.pop("input_ids")
    start = int((ids == 112).nonzero()[0, 1]) + 1
    cache = model(ids[:, :start]).cache
    found = model(ids[:, start:], **inputs, cache=cache).logits
    torch.testing.assert_close(found, model(ids, **inputs).logits[:, start:], **EXACT)


def test_generation_computes_the_last_logits_without_gradients_in_a_cache_of_exact_size(model, ids, monkeypatch):
    calls, steps, forward, recorded_step = [], [], model.forward, generation.recorded_step

    def record(*arguments, **options):
        calls.append((options.get("logits_to_keep"), options["cache"].max_length, torch.is_grad_enabled()))
        return forward(*arguments, **options)

    monkeypatch.setattr(model, "forward", record)
    monkeypatch.setattr(
        generation, "recorded_step", lambda m, c, run, n, *rest: steps.append(n) or recorded_step(m, c, run, n, *rest)
    )
    assert model.generate(ids, max_new_tokens=4, eos_token_id=()).shape == (1, 10)
    assert calls == [(1, 10, False)] + [(None, 10, False)] * 3 and steps == [3]


@pytest.mark.parametrize(("name", "value", "other"), [("temperature", 5.0, 0.1), ("top_k", 2, 0), ("top_p", 0.2, 1.0)])
def test_sampling_arguments_come_before_generation_config(ids, name, value, other):
    model = tiny_model()
    options = {"max_new_tokens": 12, "do_sample": True, "eos_token_id": (), "seed": 3}
    expected, plain = model.generate(ids, **options, **{name: value}), model.generate(ids, **options, **{name: other})
    assert not torch.equal(expected, plain)
    model.generation_config = {name: value}
    assert torch.equal(model.generate(ids, **options), expected)
    assert torch.equal(model.generate(ids, **options, **{name: other}), plain)
    # do_sample is not read from it
    greedy = model.generate(ids, max_new_tokens=6, eos_token_id=())
    model.generation_config = {name: value, "do_sample": True}
    assert torch.equal(model.generate(ids, max_new_tokens=6, eos_token_id=()), greedy)


def test_temperature_top_k_and_top_p_are_applied_in_this_order():
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2]).log().expand(400, 4)

    def tokens(**options):
        return set(Sampler(True, seed=0, **options)(logits).tolist())

    # After temperature, 0.53 of the first token; before, 0.4
    assert tokens(temperature=0.5, top_p=0.5) == {1} and tokens(top_p=0.5) == {1, 2}
    # After top_k, 0.44 of the first token; before, 0.4
    assert tokens(top_k=3, top_p=0.42) == {1} and tokens(top_p=0.42) == {1, 2}
    assert tokens(top_k=3) == {1, 2, 3} and tokens(top_k=0) == tokens(top_k=4) == tokens(top_p=1.0) == {0, 1, 2, 3}


def test_text_streamer_ends_with_an_incomplete_character():
    written = []
    streamer = kk.TextStreamer(lambda ids: bytes(ids).decode(errors="replace"), written.append)
    streamer.put(torch.tensor([[1, 2]]))
    for byte in b"a\xe2\x82":
        streamer.put(torch.tensor([byte]))
    assert written == ["a"]
    streamer.end()
    assert written == ["a", "\ufffd"]
    streamer.put(torch.tensor([[1]]))
    with pytest.raises(ValueError, match="streamer must be used with a batch of one sequence, got 2"):
        streamer.put(torch.tensor([1, 2]))


def test_projections_on_a_gpu_equal_those_on_a_cpu(model):
    """There, one matmul computes all of them, and they are views of its output."""

    class OnGpu(torch.Tensor):
        @property
        def device(self):
            return torch.device("cuda")

    layer, x = model.model.layers[0].self_attn.qkv_proj, torch.randn(4, 64)
    with torch.no_grad():
        found = layer(x.as_subclass(OnGpu))
        assert not any(part.is_contiguous() for part in found)
        for one, other in zip(found, layer(x), strict=True):
            torch.testing.assert_close(torch.Tensor(one), other)
