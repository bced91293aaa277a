"""Conversations in a cache of `generate`: results are those without a cache, and only what is new is processed."""

import gc

import pytest
import torch

from keye_kernels.model import conversation
from tests.helpers.tiny import prompt, tiny_model

EDITIONS = ["Keye", "KeyeVL1_5"]
START, END, IMAGE, VIDEO = 112, 113, 115, 116


class Talk:
    """A conversation that is given to `generate` with all tokens and all images, and counts what the decoder processes."""

    def __init__(self, model, slots=None, batch_size=1):
        self.model, self.cache = model, model.new_cache(batch_size, slots)
        self.prefilled, self.encoded = [], []

    def ask(self, inputs, new_tokens=5, **options):
        """All tokens, after a comparison with a fresh run."""
        options = {"max_new_tokens": new_tokens, "eos_token_id": ()} | options
        expected = self.model.generate(**inputs, **options)
        lengths, patches = [], []
        hooks = [
            self.model.model.register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].shape[1])),
            self.model.visual.register_forward_pre_hook(lambda _, arguments: patches.append(len(arguments[0]))),
        ]
        found = self.model.generate(**inputs, **options, cache=self.cache)
        for hook in hooks:
            hook.remove()
        assert torch.equal(found, expected) and int(self.cache.length) == self.cache.count == found.shape[1] - 1
        self.prefilled.append(lengths[0])
        self.encoded.append(patches)
        assert lengths[1:] == [1] * (new_tokens - 1)
        return found

    def logits(self, inputs):
        """The logits of the next token, and the rope deltas, in the cache and in a fresh one."""
        length = inputs["input_ids"].shape[1]
        self.model.generate(**inputs, max_new_tokens=1, cache=self.cache)
        assert int(self.cache.length) == self.cache.count == length
        token = torch.full((len(inputs["input_ids"]), 1), 7)
        fresh = self.model(**inputs).cache
        return [(self.model(token, cache=cache).logits, cache.rope_deltas) for cache in (self.cache, fresh)]


def then(before, turn):
    """The inputs of a conversation whose tokens so far are `before` [1, S], with a further turn."""
    return turn["input_ids"].new_tensor([*before[0].tolist(), *turn["input_ids"][0].tolist()])[None]


def media(*turns):
    return {name: torch.cat([turn[name] for turn in turns]) for name in ("pixel_values", "image_grid_thw")}


def video(grid, lead, seed=0, seconds=1.5):
    pixels = torch.randn(grid[0] * grid[1] * grid[2], 3, 14, 14, generator=torch.Generator().manual_seed(seed))
    ids = [*range(lead), START, *[VIDEO] * (len(pixels) // 4), END, 5]
    return {
        "input_ids": torch.tensor([ids]), "pixel_values_videos": pixels,
        "video_grid_thw": torch.tensor([grid]), "second_per_grid_ts": torch.tensor([seconds]),
    }  # fmt: skip


@pytest.fixture(params=EDITIONS)
def model(request):
    return tiny_model(model_type=request.param)


@pytest.mark.parametrize("slots", [None, 128])
def test_the_third_turn_of_a_conversation_with_two_images_processes_its_own_tokens(model, slots):
    talk = Talk(model, slots)
    first, second = prompt([(1, 4, 6)], seed=1), prompt([(1, 8, 2)], lead=2, seed=2)
    one = talk.ask(first)
    two = talk.ask({"input_ids": then(one, second), **media(first, second)})
    third = {"input_ids": torch.tensor([[8, 9, 10]])}
    three = talk.ask({"input_ids": then(two, third), **media(first, second)})
    # The last token of an answer was chosen, but not processed
    own = [len(turn["input_ids"][0]) for turn in (first, second, third)]
    assert talk.prefilled == [own[0], own[1] + 1, own[2] + 1]
    assert talk.encoded == [[24], [16], []]
    inputs = {"input_ids": then(three, third), **media(first, second)}
    (found, deltas), (expected, expected_deltas) = talk.logits(inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(deltas, expected_deltas)


def test_images_of_the_new_turn_are_enough(model):
    talk = Talk(model)
    turns = [prompt([(1, 4, 6)], seed=1), prompt([(1, 8, 2), (1, 2, 2)], lead=2, seed=2), prompt([(1, 2, 4)], seed=3)]
    tokens = talk.ask(turns[0])
    for index in (1, 2):
        ids = then(tokens, turns[index])
        tokens = model.generate(ids, **media(turns[index]), max_new_tokens=4, eos_token_id=(), cache=talk.cache)
        expected = model.generate(ids, **media(*turns[: index + 1]), max_new_tokens=4, eos_token_id=())
        assert torch.equal(tokens, expected)
    # In a later turn, all of them again, or none
    ids = then(tokens, {"input_ids": torch.tensor([[3, 4]])})
    talk.ask({"input_ids": ids, **media(*turns)})
    assert talk.prefilled[-1] == 3 and talk.encoded[-1] == []
    found = model.generate(ids, max_new_tokens=4, eos_token_id=(), cache=talk.cache)
    assert torch.equal(found, model.generate(ids, **media(*turns), max_new_tokens=4, eos_token_id=()))


def test_videos_and_their_times(model):
    talk = Talk(model)
    first, second = video((3, 2, 4), 4), video((2, 4, 4), 2, seed=1, seconds=2.5)
    image = prompt([(1, 4, 4)], seed=3)
    one = talk.ask(first)
    both = {name: torch.cat((first[name], second[name])) for name in first if name != "input_ids"}
    two = talk.ask({"input_ids": then(one, second), **both})
    three = talk.ask({"input_ids": then(two, image), **both, **media(image)})
    assert talk.prefilled[1:] == [second["input_ids"].shape[1] + 1, image["input_ids"].shape[1] + 1]
    assert talk.encoded == [[24], [32], [16]]
    inputs = {"input_ids": three, **both, **media(image)}
    (found, deltas), (expected, expected_deltas) = talk.logits(inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(deltas, expected_deltas)
    # Another time of the second video: with what is before it, the first one is kept
    talk.ask(inputs | {"second_per_grid_ts": torch.tensor([1.5, 4.0])})
    assert talk.encoded[-1] == [32, 16] or talk.encoded[-1] == [16, 32]


@pytest.mark.parametrize("drafts", [1, 4])
def test_prompt_lookup_in_a_conversation(model, drafts):
    first, second = {"input_ids": torch.tensor([[5, 6, 7, 8] * 4])}, {"input_ids": torch.tensor([[5, 6, 7]])}
    cache, options = model.new_cache(1), {"max_new_tokens": 9, "eos_token_id": ()}
    one = model.generate(**first, **options, prompt_lookup=drafts, cache=cache)
    assert cache.count == int(cache.length) == one.shape[1] - 1
    ids = then(one, second)
    found = model.generate(ids, **options, prompt_lookup=drafts, cache=cache)
    assert torch.equal(found, model.generate(ids, **options)) and cache.count == int(cache.length) == found.shape[1] - 1


def test_an_edited_conversation_keeps_what_is_before_the_edit(model):
    talk = Talk(model)
    first, second = prompt([(1, 4, 6)], seed=1), prompt([(1, 8, 2)], lead=2, seed=2)
    ids = torch.cat((first["input_ids"], second["input_ids"]), dim=1)
    length = first["input_ids"].shape[1]
    talk.ask({"input_ids": ids, **media(first, second)})
    for column in (length + 1, length - 2, 1):
        edited = ids.clone()
        edited[0, column] = 99
        talk.ask({"input_ids": edited, **media(first, second)})
        assert talk.prefilled[-1] == ids.shape[1] - column
        talk.ask({"input_ids": ids, **media(first, second)})
        assert talk.prefilled[-1] == ids.shape[1] - column
    # Shorter, and the same once more: one token is processed for its logits
    talk.ask({"input_ids": first["input_ids"], **media(first)})
    assert talk.prefilled[-1] == 1 and talk.encoded[-1] == []


def test_another_image_of_the_same_size_is_another_conversation(model):
    """Its tokens are the same. What is before its block is kept, without the start token of the block."""
    talk = Talk(model)
    first, second, other = (prompt([(1, 4, 4)], lead=4, seed=seed) for seed in (1, 2, 3))
    ids = torch.cat((first["input_ids"], second["input_ids"]), dim=1)
    talk.ask({"input_ids": ids, **media(first, second)})
    talk.ask({"input_ids": ids, **media(first, other)})
    assert talk.prefilled[-1] == second["input_ids"].shape[1] - 4 and talk.encoded[-1] == [16]
    talk.ask({"input_ids": ids, **media(other, other)})
    assert talk.prefilled[-1] == ids.shape[1] - 4 and talk.encoded[-1] == [32]
    # Of two images, one token of the second block is another one
    shapes = prompt([(1, 2, 8)], lead=4, seed=1)
    talk.ask({"input_ids": ids, **media(shapes, other)})
    assert talk.prefilled[-1] == ids.shape[1] - 4


def test_the_cut_is_never_inside_of_an_image(model):
    """Two images of one row of tokens become one of two rows."""
    talk = Talk(model)
    two, one = prompt([(1, 2, 4)], lead=3, seed=1), prompt([(1, 4, 4)], lead=3, seed=2)
    ids = torch.cat((one["input_ids"][:, :4], torch.tensor([[IMAGE] * 2 + [END, 7, 8]])), dim=1)
    talk.ask({"input_ids": ids, **media(two)})
    talk.ask(one)
    assert talk.prefilled[-1] == one["input_ids"].shape[1] - 3 and talk.encoded[-1] == [16]


def test_the_same_conversation_with_pixels_of_another_dtype_is_processed_again(model):
    talk = Talk(model)
    inputs = prompt([(1, 4, 4)], lead=4)
    talk.ask(inputs)
    talk.ask(inputs | {"pixel_values": inputs["pixel_values"].double()})
    assert talk.encoded[-1] == [16]


def test_a_batch_keeps_the_columns_that_all_sequences_have_in_common():
    model = tiny_model()
    talk = Talk(model, batch_size=2)
    rows = [prompt([(1, 4, 4)], lead=3, seed=1), prompt([(1, 2, 4)], lead=2, seed=2)]
    length = rows[0]["input_ids"].shape[1]
    pad = length - rows[1]["input_ids"].shape[1]
    ids = torch.cat((rows[0]["input_ids"], torch.nn.functional.pad(rows[1]["input_ids"], (pad, 0))))
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    one = talk.ask({"input_ids": ids, "attention_mask": mask, **media(*rows)})
    later = [prompt([(1, 2, 2)], lead=2, seed=seed) for seed in (3, 4)]
    ids = torch.cat((one, torch.cat([turn["input_ids"] for turn in later])), dim=1)
    mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - length), value=1)
    images = media(rows[0], later[0], rows[1], later[1])
    two = talk.ask({"input_ids": ids, "attention_mask": mask, **images})
    assert talk.prefilled == [length, later[0]["input_ids"].shape[1] + 1] and talk.encoded == [[24], [8]]
    (found, deltas), (expected, expected_deltas) = talk.logits(
        {"input_ids": two, "attention_mask": torch.nn.functional.pad(mask, (0, 5), value=1), **images}
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(deltas, expected_deltas)
    # The same tokens with other padding have other positions
    mask[1, : pad + 2] = 0
    talk.ask({"input_ids": ids, "attention_mask": mask, **images})
    assert talk.prefilled[-1] == ids.shape[1] - pad
    # Only new images of a batch, and too few of them
    ids[0, 1] = 99
    with pytest.raises(ValueError, match=r"pixel_values must have the images of the tokens from|must describe"):
        model.generate(ids, mask, **media(*later), cache=talk.cache)


def test_calls_of_forward_between_turns_are_dropped(model):
    talk = Talk(model)
    first = prompt([(1, 4, 4)], seed=1)
    one = talk.ask(first)
    model(**prompt([(1, 2, 2)], seed=2), cache=talk.cache)
    two = talk.ask({"input_ids": then(one, {"input_ids": torch.tensor([[3, 4]])}), **media(first)})
    assert talk.prefilled[-1] == 3
    talk.cache.clear()
    model(torch.tensor([[1, 2, 3]]), cache=talk.cache)
    talk.ask({"input_ids": two, **media(first)})
    assert talk.prefilled[-1] == two.shape[1]


@pytest.mark.parametrize("when", [0, 1, 3])
def test_an_interrupted_answer_keeps_the_prompt(model, when):
    class Stops:
        def __init__(self):
            self.values = []

        def put(self, value):
            self.values.append(value)
            if len(self.values) > when:
                raise KeyboardInterrupt

        def end(self):
            pass

    talk = Talk(model)
    first, second = prompt([(1, 4, 4)], seed=1), prompt([(1, 2, 4)], seed=2)
    one = talk.ask(first)
    inputs = {"input_ids": then(one, second), **media(first, second)}
    with pytest.raises(KeyboardInterrupt):
        model.generate(**inputs, max_new_tokens=5, eos_token_id=(), streamer=Stops(), cache=talk.cache)
    talk.ask(inputs)
    assert talk.prefilled[-1] == (1 if when else second["input_ids"].shape[1] + 1)


def test_a_turn_that_fails_leaves_the_cache_usable(model, monkeypatch):
    talk = Talk(model)
    first, second = prompt([(1, 4, 4)], seed=1), prompt([(1, 2, 4)], seed=2)
    one = talk.ask(first)
    inputs = {"input_ids": then(one, second), **media(first, second)}
    with pytest.raises(ValueError, match="describes 24 patches, but 20"):
        model.generate(**inputs | {"pixel_values": inputs["pixel_values"][:20]}, cache=talk.cache)
    with pytest.raises(
        ValueError, match=r"image_grid_thw must describe the 6 image placeholders .* the 2 .* not in the cache, got 4"
    ):
        model.generate(inputs["input_ids"], **media(first), cache=talk.cache)
    handle = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate(**inputs, cache=talk.cache)
    handle.remove()
    talk.ask(inputs)
    assert talk.prefilled[-1] == second["input_ids"].shape[1] + 1


def test_logits_that_are_not_finite_empty_the_cache(model):
    talk, ids = Talk(model), torch.tensor([[1, 2, 3]])
    weight = model.model.layers[0].mlp.down_proj.weight.data
    value = weight[0, 0].clone()
    weight[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="NaN"):
        model.generate(ids, max_new_tokens=3, cache=talk.cache)
    weight[0, 0] = value
    talk.ask({"input_ids": ids})
    assert talk.prefilled == [3]


def test_caches_that_do_not_fit_are_refused(model):
    ids = torch.tensor([[1, 2, 3]])
    wrong = {
        "cache holds 2 sequences, but input_ids has 1": model.new_cache(2),
        "cache has 8 slots per sequence, too few for 3 prompt tokens and 6 new tokens": model.new_cache(1, 8),
        r"cache must have the layers, .* got .*'torch.float16'": tiny_model().half().new_cache(1),
        r"cache must have the layers, .*\['2', '2', '32'.* got \['1', '2', '32'": tiny_model(num_hidden_layers=1).new_cache(1),
    }
    for message, cache in wrong.items():
        with pytest.raises(ValueError, match=message):
            model.generate(ids, max_new_tokens=6, cache=cache)
        assert cache.is_empty
    with pytest.raises(TypeError, match="cache must be a KVCache"):
        model.generate(ids, cache={})
    cache = model.new_cache(1, 9)
    assert model.generate(ids, max_new_tokens=6, eos_token_id=(), cache=cache).shape == (1, 9)
    with pytest.raises(ValueError, match="position_ids must be None with a cache"):
        model.generate(ids, position_ids=torch.zeros(3, 1, 3, dtype=torch.int64), max_new_tokens=1, cache=cache)
    other = tiny_model(model_type=model.config.model_type)
    with pytest.raises(ValueError, match="another model has filled"):
        other.generate(ids, max_new_tokens=1, cache=cache)
    cache.clear()
    other.generate(ids, max_new_tokens=1, cache=cache)


def test_a_conversation_does_not_keep_its_model():
    model = tiny_model()
    cache = model.new_cache(1)
    model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, cache=cache)
    reference = cache.conversation.model
    assert reference() is model
    del model
    gc.collect()
    assert reference() is None


def test_a_block_over_two_sequences_is_never_kept():
    """Its placeholders are counted over the whole batch."""
    ids = torch.tensor([[1, START, IMAGE, IMAGE], [IMAGE, IMAGE, 2, 3]])
    inputs = {"pixel_values": torch.zeros(16, 3, 14, 14), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    config = tiny_model().config
    (block,) = conversation._blocks(config, conversation.MEDIA[0], ids, torch.ones_like(ids) > 0, inputs, [], 0, {})
    assert (block.start, block.end) == (0, 4) and conversation._end_of_whole_blocks(3, [block], {block}) == 0
