"""Calls with a non-empty cache: chunks of a prompt, later turns with images, and their checks."""

import pytest
import torch

import keye_kernels as kk
from keye_kernels.model.config import MAX_POSITION
from tests.helpers.tiny import prompt, tiny_model

EDITIONS = ["Keye", "KeyeVL1_5"]


def joined(first, second):
    """Both prompts as one."""
    return {name: torch.cat((first[name], second[name]), dim=int(name == "input_ids")) for name in first}


def run(model, *calls, batch_size=1):
    """The logits of all calls [B, S, V] with one cache, and its rope_deltas."""
    cache = model.new_cache(batch_size, 128)
    with torch.no_grad():
        logits = [model(**call, cache=cache).logits for call in calls]
    return torch.cat(logits, dim=1), cache.rope_deltas


def text(*ids):
    return {"input_ids": torch.tensor([ids])}


@pytest.mark.parametrize("edition", EDITIONS)
def test_later_turns_with_images_equal_one_prompt(edition):
    model = tiny_model(model_type=edition)
    first, second = prompt([(1, 4, 6)], seed=1), prompt([(1, 8, 2), (1, 4, 4)], lead=2, seed=2)
    third = prompt([(1, 2, 2)], lead=1, seed=3)
    found, deltas = run(model, first, text(7), second, text(8, 9), third)
    everything = joined(joined(joined(joined(first, text(7) | media(first)), second), text(8, 9) | media(first)), third)
    expected, expected_deltas = run(model, everything)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(deltas, expected_deltas)


def media(inputs):
    """Empty pixels and grids, to join text with prompts that have images."""
    return {name: inputs[name][:0] for name in ("pixel_values", "image_grid_thw")}


@pytest.mark.parametrize("edition", EDITIONS)
def test_later_videos_and_their_times_equal_one_prompt(edition):
    model = tiny_model(model_type=edition)
    grid_thw = torch.tensor([[3, 2, 4]])
    pixels = torch.randn(24, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    video = {"pixel_values_videos": pixels, "video_grid_thw": grid_thw, "second_per_grid_ts": torch.tensor([1.5])}
    turn = text(4, 112, *[116] * 6, 113, 5) | video
    found = run(model, text(1, 2, 3), turn)
    expected = run(model, text(1, 2, 3, *turn["input_ids"][0].tolist()) | video)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("edition", EDITIONS)
def test_prefill_in_chunks_equals_whole_prefill_in_a_padded_batch(edition):
    """The first chunk of the second sequence is padding only. The mask has the width of the chunk or of all tokens so far."""
    model = tiny_model(model_type=edition)
    first, second = prompt([(1, 4, 4)], lead=9, seed=1), prompt([(1, 2, 6)], lead=2, seed=2)
    length, split = first["input_ids"].shape[1], 4
    pad = length - second["input_ids"].shape[1]
    assert pad > split
    ids = torch.cat((first["input_ids"], torch.cat((torch.zeros(1, pad, dtype=torch.int64), second["input_ids"]), dim=1)))
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    images = {name: torch.cat((first[name], second[name])) for name in ("pixel_values", "image_grid_thw")}
    expected, _ = run(model, {"input_ids": ids, "attention_mask": mask, **images}, {"input_ids": ids[:, :1]}, batch_size=2)
    for start in (split, 0):
        chunks = [
            {"input_ids": ids[:, :split], "attention_mask": mask[:, :split]},
            {"input_ids": ids[:, split:], "attention_mask": mask[:, start:], **images},
            {"input_ids": ids[:, :1]},
        ]
        found, _ = run(model, *chunks, batch_size=2)
        is_token = torch.cat((mask, torch.ones(2, 1)), dim=1).bool()
        torch.testing.assert_close(found[is_token], expected[is_token], atol=1e-5, rtol=1e-5)
        assert found.isfinite().all()


def test_a_later_turn_of_a_padded_batch_equals_single_conversations():
    """Padding takes slots of the cache, but no positions: of a turn with images, of text, of one token and of none."""
    model = tiny_model()
    turns = [[prompt([(1, 2, 4)], seed=1), text(3, 4, 5)], [text(5, 6, 7, 8), text(9)], [text(1, 2), text()]]
    alone = [run(model, *(turn for turn in calls if turn["input_ids"].numel()), text(11))[0][:, -1] for calls in turns]
    batch = []
    for turn in zip(*turns, strict=True):
        rows = [one["input_ids"][0].long() for one in turn]
        width = max(map(len, rows))
        ids, mask = torch.zeros(3, width, dtype=torch.int64), torch.zeros(3, width, dtype=torch.int64)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
        images = {name: value for name, value in turn[0].items() if name != "input_ids"}
        batch.append({"input_ids": ids, "attention_mask": mask, **images})
    together, _ = run(model, *batch, {"input_ids": torch.tensor([[11]] * 3)}, batch_size=3)
    torch.testing.assert_close(together[:, -1], torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_the_oldest_columns_of_a_full_mask_do_not_hide_the_new_token():
    model = tiny_model()
    ids, mask = torch.tensor([[0, 0, 1, 2], [3, 4, 5, 6]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    inputs, token = {"input_ids": ids, "attention_mask": mask}, torch.tensor([[7], [8]])
    expected, _ = run(model, inputs, {"input_ids": token}, {"input_ids": token}, batch_size=2)
    steps = [{"input_ids": token, "attention_mask": torch.nn.functional.pad(mask, (0, n), value=1)} for n in (1, 2)]
    assert torch.equal(run(model, inputs, *steps, batch_size=2)[0], expected)


def test_a_start_token_and_its_placeholders_in_different_calls_are_refused():
    """Preview counts the blocks of placeholders by their start tokens."""
    model, image = tiny_model(), prompt([(1, 2, 2)])
    cache = model(torch.tensor([[1]])).cache
    model(torch.tensor([[112]]), cache=cache)
    with pytest.raises(ValueError, match=r"must not end with <.vision_start.> or start with a placeholder"):
        model(**image | text(115, 113), cache=cache)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (text(1, 112, 115, 113), "one image placeholder .* 0 merged patches of image_grid_thw, got 1"),
        (text(1, 112, 116, 113), "one video placeholder .* 0 merged patches of video_grid_thw, got 1"),
        (text(1, 2) | prompt([(1, 2, 2)]) | text(1, 2), "one image placeholder .* 1 merged patches of image_grid_thw, got 0"),
        (prompt([(1, 2, 2)]) | text(1), "one image placeholder .* 1 merged patches of image_grid_thw, got 0"),
    ],
    ids=["image without pixels", "video without pixels", "pixels without placeholder", "pixels with one token"],
)
def test_placeholders_and_pixels_of_a_later_turn_are_checked(call, message):
    model = tiny_model()
    output = model(torch.tensor([[1, 2, 3]]))
    deltas = output.cache.rope_deltas.clone()
    with pytest.raises(ValueError, match=message):
        model(**call, cache=output.cache)
    assert torch.equal(output.cache.rope_deltas, deltas) and int(output.cache.length) == 3


def test_a_turn_that_fails_leaves_the_cache_unchanged():
    model = tiny_model()
    first, second = prompt([(1, 2, 4)], seed=1), prompt([(1, 4, 4)], seed=2)
    expected, _ = run(model, first, second)
    cache = model.new_cache(1, 128)
    with torch.no_grad():
        one = model(**first, cache=cache).logits
        with pytest.raises(ValueError, match="patches were given"):
            model(**second | {"pixel_values": second["pixel_values"][:8]}, cache=cache)
        torch.testing.assert_close(torch.cat((one, model(**second, cache=cache).logits), dim=1), expected)


def test_decoding_steps_read_no_positions(monkeypatch):
    model = tiny_model()
    output = model(**prompt([(1, 2, 4)]))
    monkeypatch.setattr(kk.Keye, "get_rope_index", None)
    monkeypatch.setattr("keye_kernels.model.keye.check_position_range", None)
    assert model(torch.tensor([[5]]), cache=output.cache).logits.shape == (1, 1, 120)


def test_positions_that_rope_cannot_represent_are_refused():
    model = tiny_model()
    ids = torch.tensor([[1, 2, 3]])
    positions = torch.arange(3).expand(3, 1, 3) + MAX_POSITION - 10
    cache = model.new_cache(1, 8)
    model(ids, position_ids=positions, cache=cache)
    with pytest.raises(ValueError, match=r"position_ids must not exceed 8388608 .* got 8388601 in a cache with room for 8"):
        model(ids, position_ids=positions + 1, cache=model.new_cache(1, 8))
    cache.rope_deltas += MAX_POSITION
    with pytest.raises(ValueError, match="position_ids must not exceed"):
        model(ids, cache=cache)


@pytest.mark.parametrize(
    ("seconds", "message"),
    [
        ([float("nan")], "finite, not negative"),
        ([-1.0], "finite, not negative"),
        ([-1e-6], "finite, not negative"),
        ([float("inf")], "finite, not negative"),
        ([1e9], "below 1.3981e"),
        ([1.0, 1.0], "one number for each of 1 videos, got 2"),
        ([], "one number for each of 1 videos, got 0"),
    ],
    ids=str,
)
def test_invalid_seconds_are_refused(seconds, message):
    ids = torch.tensor([[1, 112, *[116] * 6, 113]])
    for model in (tiny_model(), tiny_model(model_type="KeyeVL1_5")):
        for given in (seconds, torch.tensor(seconds)):
            with pytest.raises(ValueError, match=f"second_per_grid_ts must .*{message}"):
                model.get_rope_index(ids, video_grid_thw=torch.tensor([[3, 2, 4]]), second_per_grid_ts=given)


@pytest.mark.parametrize("seconds", [["a"], [None], {}, [[1.0], [1.0, 2.0]]], ids=str)
def test_seconds_that_are_no_numbers_are_refused(seconds):
    ids, grid_thw = torch.tensor([[1, 112, *[116] * 6, 113]]), torch.tensor([[3, 2, 4]])
    with pytest.raises(ValueError, match="second_per_grid_ts must be one number per video, got"):
        tiny_model().get_rope_index(ids, video_grid_thw=grid_thw, second_per_grid_ts=seconds)


def test_the_time_limit_of_a_video_depends_on_its_frames():
    model, ids = tiny_model(), torch.tensor([[1, 112, *[116] * 6, 113]])
    position_ids, _ = model.get_rope_index(ids, video_grid_thw=torch.tensor([[3, 2, 4]]), second_per_grid_ts=[1_398_101.0])
    assert position_ids.max() < MAX_POSITION
