"""Generation: sampling, stopping, streaming, batches and the KV cache."""

import sys

import pytest
import torch

import keye_kernels as kk
from keye_kernels.model.generation import Sampler
from tests.helpers.tiny import prompt, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


class RecordingStreamer:
    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values.append(value.clone())

    def end(self):
        self.ended += 1


def test_cached_steps_equal_one_forward(model):
    """A step may have one token or several."""
    inputs = prompt([(1, 4, 6), (1, 2, 2)])
    extra = torch.randint(0, 100, (1, 7), generator=torch.Generator().manual_seed(3))
    whole = {**inputs, "input_ids": torch.cat((inputs["input_ids"], extra), dim=1)}
    with torch.no_grad():
        expected = model(**whole).logits[:, -7:]
        for steps in ([1] * 7, [3, 4], [7]):
            output = model(**inputs)
            found = []
            for part in extra.split(steps, dim=1):
                output = model(part, cache=output.cache)
                found.append(output.logits)
            torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-5, rtol=1e-5)


def test_left_padded_batch_equals_single_sequences(model):
    sequences = [prompt([(1, 4, 4)], lead=2, seed=1), prompt([(1, 2, 6), (1, 2, 2)], lead=9, seed=2), prompt([], seed=3)]
    length = max(sequence["input_ids"].shape[1] for sequence in sequences)
    ids, mask = torch.zeros(3, length, dtype=torch.int64), torch.zeros(3, length, dtype=torch.int64)
    for i, sequence in enumerate(sequences):
        n = sequence["input_ids"].shape[1]
        ids[i, -n:], mask[i, -n:] = sequence["input_ids"][0], 1
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.cat([sequence["pixel_values"] for sequence in sequences[:2]]),
        "image_grid_thw": torch.cat([sequence["image_grid_thw"] for sequence in sequences[:2]]),
    }
    together = model.generate(**batch, max_new_tokens=6, eos_token_id=())[:, length:]
    for i, sequence in enumerate(sequences):
        alone = model.generate(**sequence, max_new_tokens=6, eos_token_id=())[0, sequence["input_ids"].shape[1] :]
        assert torch.equal(together[i], alone)


def test_caches_of_two_conversations_are_independent(model):
    first, second = prompt([(1, 4, 4)], seed=1), prompt([(1, 2, 8)], lead=8, seed=2)
    token = torch.tensor([[5]])
    with torch.no_grad():
        alone = model(token, cache=model(**first).cache).logits
        one, _ = model(**first), model(**second)
        assert torch.equal(model(token, cache=one.cache).logits, alone)


def test_logits_to_keep(model):
    inputs = prompt([(1, 2, 4)])
    with torch.no_grad():
        everything = model(**inputs).logits
        kept = model(**inputs, logits_to_keep=2).logits
    assert kept.shape[1] == 2
    torch.testing.assert_close(kept, everything[:, -2:])


def test_generation_stops_at_any_end_token_and_pads(model):
    inputs = {"input_ids": torch.randint(0, 100, (3, 5), generator=torch.Generator().manual_seed(0))}
    free = model.generate(**inputs, max_new_tokens=12, eos_token_id=())
    assert free.shape == (3, 17)
    new = free[:, 5:].tolist()
    ends = [new[0][2], new[1][5]]
    stopped = model.generate(**inputs, max_new_tokens=12, eos_token_id=ends, pad_token_id=119)[:, 5:].tolist()
    lengths = [next((i + 1 for i, token in enumerate(tokens) if token in ends), 12) for tokens in new]
    assert len(stopped[0]) == max(lengths)
    for tokens, length, found in zip(new, lengths, stopped, strict=True):
        assert found == tokens[:length] + [119] * (len(found) - length)


def test_generation_config_gives_the_defaults():
    model = tiny_model()
    inputs = {"input_ids": torch.tensor([[1, 2, 3]])}
    free = model.generate(**inputs, max_new_tokens=8)[0, 3:].tolist()
    model.generation_config = {"eos_token_id": [free[1], 118], "do_sample": True, "top_k": 1}
    assert model.generate(**inputs, max_new_tokens=8)[0, 3:].tolist() == free[:2]
    # top_k=1 of the generation config makes sampling greedy
    sampled = model.generate(**inputs, max_new_tokens=8, do_sample=True, eos_token_id=())[0, 3:].tolist()
    assert sampled == free


def test_seed_makes_sampling_repeatable(model):
    inputs = {"input_ids": torch.tensor([[1, 2, 3]])}
    options = {"max_new_tokens": 20, "do_sample": True, "temperature": 2.0, "eos_token_id": ()}
    for seed in (0, 1):
        first, again, other = (model.generate(**inputs, **options, seed=seed) for seed in (seed, seed, seed + 1))
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_sampler_frequencies_follow_the_truncated_distribution():
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    logits = probabilities.log().expand(20000, 4)

    def frequencies(**options):
        return torch.bincount(Sampler(True, seed=0, **options)(logits), minlength=4) / 20000

    torch.testing.assert_close(frequencies(), probabilities, atol=0.02, rtol=0)
    torch.testing.assert_close(frequencies(top_k=2), torch.tensor([4 / 7, 3 / 7, 0, 0]), atol=0.02, rtol=0)
    torch.testing.assert_close(frequencies(top_p=0.6), torch.tensor([4 / 7, 3 / 7, 0, 0]), atol=0.02, rtol=0)
    assert frequencies(top_p=0.01)[0] == 1
    # The most likely token reaches top_p exactly
    halves = torch.tensor([0.5, 0.25, 0.25]).log().expand(200, 3)
    assert not Sampler(True, seed=0, top_p=0.5)(halves).any() and Sampler(True, seed=0, top_p=0.51)(halves).any()
    square = probabilities**2 / (probabilities**2).sum()
    torch.testing.assert_close(frequencies(temperature=0.5), square, atol=0.02, rtol=0)


def test_streamer_receives_prompt_tokens_and_end(model):
    streamer = RecordingStreamer()
    inputs = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}
    tokens = model.generate(**inputs, max_new_tokens=4, eos_token_id=(), streamer=streamer)
    prompt_ids, *new = streamer.values
    assert torch.equal(prompt_ids, inputs["input_ids"]) and streamer.ended == 1
    assert torch.equal(torch.stack(new, dim=1), tokens[:, 3:])


def test_text_streamer_writes_complete_characters_only():
    written = []
    streamer = kk.TextStreamer(lambda ids: bytes(ids).decode(errors="replace"), written.append)
    streamer.put(torch.tensor([[1, 2]]))
    for byte in "aé€".encode():
        streamer.put(torch.tensor([byte]))
    streamer.end()
    assert written == ["a", "é", "€"]


def test_a_text_streamer_can_be_used_again(model):
    written = []
    streamer = kk.TextStreamer(lambda ids: "".join(f"<{token}>" for token in ids), written.append)
    for ids in ([[1, 2]], [[3, 4, 5]]):
        written.clear()
        tokens = model.generate(torch.tensor(ids), max_new_tokens=3, eos_token_id=(), streamer=streamer)
        assert "".join(written) == "".join(f"<{token}>" for token in tokens[0, len(ids[0]) :].tolist())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("weight", ["lm_head", "model.layers.1.mlp.down_proj"])
def test_logits_that_are_not_finite_raise(value, do_sample, weight):
    model, streamer = tiny_model(), RecordingStreamer()
    model.get_submodule(weight).weight.data[7, 3] = value
    with pytest.raises(RuntimeError, match=r"the logits are NaN or infinite; .* another dtype than torch.float32"):
        model.generate(
            torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=do_sample, seed=0 if do_sample else None, streamer=streamer
        )
    assert streamer.ended == 1


def test_one_bad_step_is_reported(model, monkeypatch):
    """The first and the last step are finite."""
    forward, steps = model.forward, []

    def forward_with_nan(*args, **kwargs):
        output = forward(*args, **kwargs)
        steps.append(output)
        return output._replace(logits=output.logits * torch.nan) if len(steps) == 2 else output

    monkeypatch.setattr(model, "forward", forward_with_nan)
    with pytest.raises(RuntimeError, match="the logits are NaN or infinite"):
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, eos_token_id=())
    assert len(steps) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_prompts_steps_and_later_turns(model, dtype):
    inputs = prompt([(1, 4, 6)])
    calls = inputs, {"input_ids": torch.tensor([[5]])}, prompt([(1, 2, 2)], seed=1)
    results = []
    for enabled in (False, True):
        cache = model.new_cache(1, 64)
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=enabled):
            results.append([model(**call, cache=cache).logits.float() for call in calls])
            assert model.generate(**inputs, max_new_tokens=3, eos_token_id=()).shape[1] == inputs["input_ids"].shape[1] + 3
    for expected, found in zip(*results, strict=True):
        assert 0 < (found - expected).norm() < 0.03 * expected.norm()


def test_invalid_calls_raise_with_the_reason(model):
    ids = torch.tensor([[1, 2, 3]])
    grid = torch.tensor([[1, 2, 2]])
    pixels = torch.randn(4, 3, 14, 14)
    image = torch.tensor([[112, 115, 113]])
    with pytest.raises(ValueError, match="input_ids must hold at least one token"):
        model.generate(ids[:, :0])
    with pytest.raises(ValueError, match="max_new_tokens: 3 prompt tokens and 4000 new tokens exceed"):
        model.generate(ids, max_new_tokens=4000)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        model.generate(ids, max_new_tokens=0)
    with pytest.raises(ValueError, match=r"one image placeholder .* 1 merged patches of image_grid_thw, got 0"):
        model(ids, pixel_values=pixels, image_grid_thw=grid)
    with pytest.raises(ValueError, match=r"one image placeholder .* 0 merged patches of image_grid_thw, got 1"):
        model(image)
    with pytest.raises(ValueError, match="attention_mask must be 1 for image placeholders"):
        model(image, torch.tensor([[0, 0, 1]]), pixel_values=pixels, image_grid_thw=grid)
    with pytest.raises(ValueError, match=r"attention_mask must have shape \[1, 3\]"):
        model(ids, torch.ones(2, 3))
    with pytest.raises(ValueError, match="padding between its tokens"):
        model(ids, torch.tensor([[1, 0, 1]]))
    with pytest.raises(ValueError, match="attention_mask must pad on the left for generation"):
        model.generate(ids, torch.tensor([[1, 1, 0]]))
    with pytest.raises(ValueError, match="rows and columns divisible by 2"):
        model(image, pixel_values=pixels, image_grid_thw=torch.tensor([[1, 4, 1]]))
    with pytest.raises(ValueError, match="describes 4 patches, but 8 patches were given"):
        model(image, pixel_values=torch.randn(8, 3, 14, 14), image_grid_thw=grid)
    with pytest.raises(ValueError, match="pixel_values must have shape"):
        model(image, pixel_values=pixels.flatten(1), image_grid_thw=grid)
    with pytest.raises(ValueError, match="pixel_values and image_grid_thw must be given together, got only pixel_values"):
        model(image, pixel_values=pixels)
    with pytest.raises(ValueError, match="must not end with"):
        model(torch.tensor([[1, 112]]))
    with pytest.raises(ValueError, match="cache has 4 slots per sequence, 0 of them used: 5 more tokens do not fit"):
        model(torch.ones(1, 5, dtype=torch.int64), cache=model.new_cache(1, 4))
    cache = model(ids, cache=model.new_cache(1, 4)).cache
    with pytest.raises(ValueError, match="3 of them used: 2 more tokens do not fit"):
        model(ids[:, :2], cache=cache)
    with pytest.raises(ValueError, match="cache holds 1 sequences, but input_ids has 2"):
        model(ids.repeat(2, 1), cache=cache)
    nan = float("nan")
    sampling = ("temperature", 0.0), ("temperature", nan), ("temperature", "1"), ("top_p", 1.5), ("top_p", nan), ("top_k", -1)
    for name, value in (*sampling, ("top_k", 2.5), ("pad_token_id", 120), ("pad_token_id", -1), ("eos_token_id", [0.5])):
        with pytest.raises(ValueError, match=f"{name} must"):
            model.generate(ids, do_sample=True, **{name: value})
    for value in (-1, 1.5, True):
        with pytest.raises(ValueError, match="logits_to_keep must be an integer from 0"):
            model(ids, logits_to_keep=value)


def test_flash_attn_computes_the_attention_of_prompts_only(monkeypatch):
    """flash-attn needs a GPU, so the reference replaces it and records the calls."""
    from keye_kernels import reference

    causal_of_calls = []

    def attend(q, k, v, cu_seqlens, max_seqlen, softmax_scale, causal, return_lse, covers_all_tokens):
        causal_of_calls.append(causal)
        return reference.varlen_attention(q, k, v, cu_seqlens, softmax_scale, causal, return_lse)

    monkeypatch.setattr(sys.modules["keye_kernels.ops.varlen_attention"], "flash_attn_attention", attend)
    expected, model = tiny_model(), tiny_model()
    flash = kk.Keye(model.config, impl="flash_attn").eval()
    flash.load_state_dict(model.state_dict())
    inputs = prompt([(1, 4, 4)])
    options = {"max_new_tokens": 4, "eos_token_id": ()}
    assert torch.equal(flash.generate(**inputs, **options), expected.generate(**inputs, **options))
    # Two layers of the tower, and two of the decoder for the prompt only
    assert causal_of_calls == [False] * 2 + [True] * 2
