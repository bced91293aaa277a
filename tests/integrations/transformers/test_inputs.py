"""Inputs of the transformers model: later turns of padded batches, videos, seconds, logits_to_keep, loss and loading."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig

import keye_kernels as kk
from keye_kernels.editions import EDITIONS
from tests.helpers.auto_model import load
from tests.helpers.tiny import CONFIG, prompt, save_checkpoint, tiny_model

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
GREEDY = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0}


def left_padded(*prompts):
    """A batch of these prompts, and its mask."""
    width = max(single["input_ids"].shape[1] for single in prompts)
    pads = [width - single["input_ids"].shape[1] for single in prompts]
    ids = torch.cat([F.pad(single["input_ids"], (n, 0)) for single, n in zip(prompts, pads, strict=True)])
    mask = torch.stack([(torch.arange(width) >= n).long() for n in pads])
    names = {name for single in prompts for name in single} - {"input_ids"}
    media = {name: torch.cat([single[name] for single in prompts if name in single]) for name in names}
    return {"input_ids": ids, **media}, mask


def video(seconds, *grid_thw, seed=0):
    """A prompt with one video, or several."""
    image = prompt(list(grid_thw), seed=seed)
    return {
        "input_ids": image["input_ids"].masked_fill(image["input_ids"] == 115, 116),
        "pixel_values_videos": image["pixel_values"],
        "video_grid_thw": image["image_grid_thw"],
        "second_per_grid_ts": torch.tensor(seconds),
    }


def test_a_later_turn_with_images_of_a_padded_batch(tiny, tiny_folder):
    """Its mask has the columns of all tokens."""
    first, mask = left_padded(prompt([(1, 4, 4)], seed=1), prompt([(1, 2, 2)], seed=2))
    second, second_mask = left_padded(prompt([(1, 2, 2)], seed=3), prompt([(1, 4, 6)], seed=4))
    assert not mask.all() and not second_mask.all()
    lean, cache = kk.Keye.from_pretrained(tiny_folder), None
    output = tiny(**first, attention_mask=mask)
    cache = lean(**first, attention_mask=mask).cache
    both = torch.cat((mask, second_mask), dim=1)
    found = tiny(**second, attention_mask=both, past_key_values=output.past_key_values)
    expected = lean(**second, attention_mask=second_mask, cache=cache)
    kept = second_mask.bool()
    torch.testing.assert_close(found.logits[kept], expected.logits[kept], **CLOSE)
    assert torch.equal(found.rope_deltas, expected.rope_deltas)
    token, full = torch.tensor([[5], [6]]), F.pad(both, (0, 1), value=1)
    last = tiny(token, attention_mask=full, past_key_values=found.past_key_values).logits
    torch.testing.assert_close(last, lean(token, cache=expected.cache).logits, **CLOSE)


def test_beams_and_samples_repeat_images_and_videos_of_each_sequence(tiny):
    """One sequence with a video and an image, one with text, one with two videos."""
    mixed = {**video([0.5], (2, 2, 4), seed=1)}
    image = prompt([(1, 2, 2), (1, 4, 2)], seed=2)
    mixed["input_ids"] = torch.cat((mixed["input_ids"], image.pop("input_ids")), dim=1)
    prompts = [{**mixed, **image}, prompt([], seed=3), video([3.0, 1.0], (2, 2, 2), (3, 2, 4), seed=4)]
    batch, mask = left_padded(*prompts)
    for options in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}):
        found = tiny.generate(**batch, attention_mask=mask, **{**GREEDY, **options})[:, batch["input_ids"].shape[1] :]
        alone = [tiny.generate(**one, **{**GREEDY, **options})[:, one["input_ids"].shape[1] :] for one in prompts]
        assert torch.equal(found, torch.cat(alone))


@pytest.mark.parametrize("seconds", [[1.5], torch.tensor([1.5]), torch.tensor(1.5)], ids=["list", "tensor", "number"])
def test_one_number_of_seconds_is_that_of_all_videos(tiny, seconds):
    batch, mask = left_padded(video([1.5, 1.5], (2, 2, 2), (3, 2, 4), seed=4), video([1.5], (3, 2, 2), seed=5))
    expected = tiny.generate(**batch, attention_mask=mask, **GREEDY, num_beams=2)
    batch["second_per_grid_ts"] = seconds
    assert torch.equal(tiny.generate(**batch, attention_mask=mask, **GREEDY, num_beams=2), expected)


@pytest.mark.parametrize(
    "seconds",
    [[float("nan")], [-1.0], [float("inf")], [1e9], [1.0, 1.0], []],
    ids=["nan", "negative", "inf", "1e9", "two", "none"],
)
@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_invalid_seconds_are_refused(tiny, seconds, kind):
    inputs = {**video([1.0], (3, 2, 4)), "second_per_grid_ts": kind(seconds)}
    with pytest.raises(ValueError, match="second_per_grid_ts must"):
        tiny(**inputs)
    with pytest.raises(ValueError, match="second_per_grid_ts must"):
        tiny.generate(**inputs, **GREEDY)
    with pytest.raises(ValueError, match="second_per_grid_ts must"):
        tiny.generate(**inputs, **GREEDY, num_beams=2)


def test_pixels_of_videos_need_their_grids(tiny):
    inputs = video([1.0], (2, 2, 2))
    for missing, other in (("video_grid_thw", "pixel_values_videos"), ("pixel_values_videos", "video_grid_thw")):
        with pytest.raises(ValueError, match=f"{other} needs {missing}"):
            tiny(**{name: value for name, value in inputs.items() if name != missing})


def test_videos_match_the_lean_model(tiny, tiny_folder):
    lean = kk.Keye.from_pretrained(tiny_folder)
    results = []
    for seconds in (0.5, 2.0):
        inputs = video([seconds], (3, 2, 4))
        found, expected = tiny(**inputs), lean(**inputs)
        torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
        assert torch.equal(found.rope_deltas, expected.rope_deltas)
        results.append(found.logits)
    assert (results[0] - results[1]).abs().max() > 1e-3


def test_four_rows_of_positions_start_with_that_of_the_text(tiny):
    ids, positions = torch.arange(6)[None], torch.tensor([[[0, 2, 3, 4, 6, 7]], [[0, 1, 5, 6, 7, 9]], [[0, 1, 2, 3, 3, 4]]])
    with_text = torch.cat((torch.zeros(1, 1, 6, dtype=torch.int64), positions))
    expected = tiny(ids, position_ids=positions)
    assert torch.equal(tiny(ids, position_ids=with_text).logits, expected.logits)
    assert expected.rope_deltas.tolist() == [[4]]


def test_logits_to_keep(tiny):
    ids = torch.arange(12).view(2, 6)
    everything = tiny(ids).logits
    for keep, expected in ((0, everything), (1, everything[:, -1:]), (4, everything[:, 2:]), (6, everything)):
        torch.testing.assert_close(tiny(ids, logits_to_keep=keep).logits, expected)
    torch.testing.assert_close(tiny(ids, logits_to_keep=torch.tensor([1, 3])).logits, everything[:, [1, 3]])
    for keep in (-1, True, 1.5):
        with pytest.raises(ValueError, match="logits_to_keep must be an integer from 0"):
            tiny(ids, logits_to_keep=keep)


def test_loss_is_divided_by_the_tokens_of_all_accumulated_batches(tiny):
    ids = torch.arange(12).view(2, 6)
    output = tiny(ids, labels=ids, num_items_in_batch=40)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / 40
    torch.testing.assert_close(output.loss, expected)


def test_a_cache_is_returned_unless_it_is_turned_off(tiny):
    ids = torch.tensor([[1, 2, 3]])
    assert tiny(ids).past_key_values.get_seq_length() == 3
    assert tiny(ids, use_cache=False).past_key_values is None and tiny(ids, use_cache=False).rope_deltas is None
    tiny.config.use_cache = False
    assert tiny(ids).past_key_values is None and tiny(ids, use_cache=True).past_key_values is not None
    states = tiny(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[0], tiny.model.embed_tokens(ids))
    tiny.config.output_hidden_states = True
    assert len(tiny(ids).hidden_states) == 3 and tiny(ids, output_hidden_states=False).hidden_states is None


def test_every_norm_has_the_configured_eps(tmp_path):
    config = {**CONFIG, "rms_norm_eps": 0.5, "vision_config": {**CONFIG["vision_config"], "layer_norm_eps": 0.25}}
    folder = save_checkpoint(tiny_model(), tmp_path, config)
    model, inputs = load(folder), prompt([(1, 4, 4)])
    for name, module in model.named_modules():
        if isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
            assert module.eps == (1e-5 if "pre_norm" in name else 0.25 if name.startswith("visual.") else 0.5), name
    torch.testing.assert_close(model(**inputs).logits, kk.Keye.from_pretrained(folder)(**inputs).logits, **CLOSE)


def test_rope_of_the_configuration_is_used(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 30.0, "mrope_section": [8, 4, 4]}
    config = {name: value for name, value in CONFIG.items() if name not in ("rope_theta", "rope_scaling")}
    inputs, results = prompt([(1, 4, 6)]), []
    for number, parameters in enumerate((rope, {**rope, "rope_theta": 1e6}, {**rope, "mrope_section": [4, 6, 6]})):
        folder = save_checkpoint(tiny_model(), tmp_path / str(number), {**config, "rope_parameters": parameters})
        found = load(folder)(**inputs).logits
        torch.testing.assert_close(found, kk.Keye.from_pretrained(folder)(**inputs).logits, **CLOSE)
        results.append(found)
    assert all((results[0] - other).abs().max() > 1e-3 for other in results[1:])


def test_unused_tensors_of_released_checkpoints_are_not_reported(tmp_path):
    extra = {
        "visual.vision_model.head.probe": torch.zeros(1, 1, 48),
        "visual.vision_model.embeddings.packing_position_embedding.weight": torch.zeros(64, 48),
        "visual.vision_model.surplus": torch.zeros(1),
    }
    _, info = load(save_checkpoint(tiny_model(), tmp_path, **extra), output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"visual.vision_model.surplus"} and not info["missing_keys"]


def test_pickles_of_a_subfolder_and_use_safetensors_false_are_refused(tiny_folder, tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "config.json").write_text((tiny_folder / "config.json").read_text())
    (tmp_path / "part" / "model.pt").touch()
    for path, options in ((tmp_path, {"subfolder": "part"}), (tiny_folder, {"use_safetensors": False})):
        with pytest.raises(ValueError, match="pickled weights can run code"):
            load(path, **options)


def test_fields_of_text_config_come_first(tmp_path):
    values = {**CONFIG, "hidden_size": 32, "text_config": {"hidden_size": 64, "model_type": "other"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert AutoConfig.from_pretrained(tmp_path).hidden_size == kk.KeyeConfig.from_pretrained(tmp_path).hidden_size == 64


@pytest.mark.parametrize("edition", EDITIONS.values(), ids=lambda edition: edition.name)
def test_defaults_of_the_configuration_are_those_of_the_lean_model(edition):
    config = AutoConfig.for_model(edition.model_type)
    assert config.lean() == kk.KeyeConfig.from_dict({"model_type": edition.model_type})
    assert config.max_position_embeddings == edition.context_length
    assert config.use_cache is True and config.tie_word_embeddings is False
    again = type(config).from_dict(copy.deepcopy(config.to_diff_dict()))
    assert again.lean() == config.lean()


def test_tensor_parallel_plans_cover_every_large_layer(tiny):
    """Projections into heads and the MLP are split by columns, those out of them by rows."""
    by_rows = {"o_proj", "out_proj", "down_proj", "fc2", "linear_2"}
    plan = {"model." + name: how for name, how in tiny.config.base_model_tp_plan.items()}
    plan |= {"visual." + name: how for name, how in tiny.visual._tp_plan.items()} | tiny._tp_plan
    layers = [name for name, module in tiny.named_modules() if isinstance(module, nn.Linear)]
    names = {".".join("*" if part.isdigit() else part for part in name.split(".")) for name in layers}
    assert names == {name for name in plan if not name.startswith(("model.model", "visual.visual"))} & names
    for name in names - {"lm_head"}:
        assert plan[name] == ("rowwise" if name.rpartition(".")[2] in by_rows else "colwise"), name
