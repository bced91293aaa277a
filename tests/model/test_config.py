"""Configuration files: every field is read, and damaged values end in one error that names the file and the field."""

import json

import pytest
import torch

import keye_kernels as kk
from keye_kernels.model.config import VisionConfig
from tests.helpers.tiny import CONFIG, save_checkpoint, tiny_model

FIELDS = {
    "hidden_size": 128,
    "intermediate_size": 33,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 12,
    "vocab_size": 77,
    "rms_norm_eps": 1e-4,
    "rope_theta": 12345.0,
    "max_position_embeddings": 99,
    "tie_word_embeddings": True,
    "initializer_range": 0.5,
    "vision_start_token_id": 70,
    "image_token_id": 71,
    "video_token_id": 72,
    "eos_token_id": 73,
    "pad_token_id": 74,
    "torch_dtype": "float16",
}
VISION_FIELDS = {
    "hidden_size": 64,
    "intermediate_size": 65,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_channels": 1,
    "image_size": 70,
    "patch_size": 7,
    "layer_norm_eps": 1e-3,
    "spatial_merge_size": 3,
    "tokens_per_second": 5,
    "rope_theta": 99.0,
}


def test_every_field_is_read():
    values = {"model_type": "KeyeVL1_5", **FIELDS, "rope_scaling": {"mrope_section": [1, 2, 3]}, "vision_config": VISION_FIELDS}
    config = kk.KeyeConfig.from_dict(values)
    assert {name: getattr(config, name) for name in FIELDS} == FIELDS
    assert config.vision_config == VisionConfig(**VISION_FIELDS) and config.mrope_section == (1, 2, 3)
    assert config.edition == "1.5"
    unread = set(kk.KeyeConfig.__dataclass_fields__) - set(FIELDS)
    assert unread == {"model_type", "mrope_section", "vision_config"}
    assert set(VisionConfig.__dataclass_fields__) == set(VISION_FIELDS)


def test_missing_and_null_fields_have_the_defaults_of_the_released_model():
    assert kk.KeyeConfig.from_dict({"model_type": "Keye"}) == kk.KeyeConfig()
    nulls = dict.fromkeys([*FIELDS, "text_config", "rope_scaling", "vision_config"])
    assert kk.KeyeConfig.from_dict({**nulls, "model_type": "Keye"}) == kk.KeyeConfig()


def test_rope_theta_of_rope_parameters_comes_first():
    values = {"model_type": "Keye", "rope_theta": 1.0, "rope_parameters": {"rope_theta": 5e5}}
    assert kk.KeyeConfig.from_dict(values).rope_theta == 5e5
    assert kk.KeyeConfig.from_dict({"model_type": "Keye", "rope_theta": 7.0}).rope_theta == 7.0


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_hidden_layers", 10**12, "an integer from 0 to 1024, got 1000000000000"),
        ("num_hidden_layers", -1, "an integer from 0"),
        ("num_hidden_layers", 2.0, "an integer from 0"),
        ("hidden_size", "64", "an integer from 1 .*got '64'"),
        ("hidden_size", True, "an integer from 1"),
        ("hidden_size", [64], "an integer from 1"),
        ("hidden_size", 0, "an integer from 1"),
        ("intermediate_size", 2**40, "an integer from 1"),
        ("vocab_size", 2**31, "an integer from 1"),
        ("max_position_embeddings", 2**23 + 1, "an integer from 1 to 8388608"),
        ("head_dim", 512, "an integer from 1 to 256"),
        ("num_attention_heads", 3, "a multiple of num_key_value_heads = 2"),
        ("num_key_value_heads", 0, "an integer from 1"),
        ("rms_norm_eps", -1, "a number from 1e-30"),
        ("rms_norm_eps", 0.0, "a number from 1e-30"),
        ("rms_norm_eps", float("nan"), "a number from 1e-30"),
        ("rope_theta", 0, "a number from 1e-30"),
        ("rope_theta", float("inf"), "a number from 1e-30"),
        ("rope_theta", {}, "a number from 1e-30"),
        ("initializer_range", -0.1, "a number from 0.0"),
        ("image_token_id", 120, "an integer from 0 to 119, got 120"),
        ("pad_token_id", -1, "an integer from 0 to 119"),
        ("eos_token_id", "</s>", "an integer or a list of integers"),
        ("eos_token_id", [1, None], "an integer or a list of integers"),
        ("eos_token_id", 120, "an integer from 0 to 119"),
        ("eos_token_id", [118, -1], "an integer from 0 to 119"),
        ("tie_word_embeddings", "false", "true or false, got 'false'"),
        ("torch_dtype", "int8", "one of float32, bfloat16, float16, float64, got 'int8'"),
        ("torch_dtype", [], "one of float32"),
        ("rope_scaling", [1], r"a JSON object, got \[1\]"),
        ("rope_parameters", "mrope", "a JSON object"),
        ("text_config", 7, "a JSON object"),
        ("vision_config", [], "a JSON object"),
    ],
    ids=str,
)
def test_damaged_fields_are_named_with_their_file(tmp_path, name, value, message):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, name: value}))
    with pytest.raises(ValueError, match=rf"config\.json: {name} must be {message}"):
        kk.KeyeConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["image_token_id", "vision_start_token_id"])
def test_special_tokens_must_differ(name):
    with pytest.raises(ValueError, match="image_token_id and video_token_id must be three different tokens, got"):
        kk.KeyeConfig.from_dict({**CONFIG, name: CONFIG["video_token_id"]})


def test_an_end_token_outside_of_the_vocabulary_is_refused():
    model, ids = tiny_model(), torch.tensor([[1, 2]])
    for ends in (120, [3, -1], {}, True):
        with pytest.raises(ValueError, match="eos_token_id must be"):
            model.generate(ids, max_new_tokens=2, eos_token_id=ends)


@pytest.mark.parametrize("section", [5, "abc", [16, 24], [4.0, 6.0, 6.0], [-4, 14, 6], [4, 6, None]], ids=str)
def test_damaged_mrope_sections_are_named(section):
    with pytest.raises(ValueError, match="mrope_section must be three numbers that add up to head_dim/2 = 16"):
        kk.KeyeConfig.from_dict({**CONFIG, "rope_scaling": {"type": "mrope", "mrope_section": section}})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_hidden_layers", 10**12, "an integer from 0 to 1024"),
        ("patch_size", 0, "an integer from 1"),
        ("image_size", 2**20, "an integer from 1"),
        ("hidden_size", 50, "a multiple of 4"),
        ("layer_norm_eps", -1e-6, "a number from 1e-30"),
        ("rope_theta", -1, "a number from 1e-30"),
        ("tokens_per_second", "2", "a number from 0.001"),
        ("spatial_merge_size", 0, "an integer from 1"),
    ],
    ids=str,
)
def test_damaged_fields_of_the_tower_are_named(tmp_path, name, value, message):
    values = {**CONFIG, "vision_config": {**CONFIG["vision_config"], name: value}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"config\.json: vision_config\.{name} must be {message}"):
        kk.KeyeConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    "content", ["[]", "null", "7", '"text"', "{", "", "[" * 100_000, "\udcff"], ids=lambda c: c[:4] or "empty"
)
def test_files_that_are_no_json_object_are_named(tmp_path, file, content):
    path = save_checkpoint(tiny_model(), tmp_path)
    (path / file).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"{file} (is not valid JSON|must be a JSON object)"):
        kk.Keye.from_pretrained(path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("eos_token_id", "</s>", "an integer or a list of integers"),
        ("eos_token_id", [1.5], "an integer or a list of integers"),
        ("eos_token_id", {}, "an integer or a list of integers"),
        ("eos_token_id", True, "an integer or a list of integers"),
        ("eos_token_id", [1, 10**9], "an integer from 0 to 119"),
        ("pad_token_id", 120, "an integer from 0 to 119"),
        ("pad_token_id", [1], "an integer from 0 to 119"),
        ("temperature", "hot", "a number from"),
        ("temperature", float("nan"), "a number from"),
        ("top_k", 1.5, "an integer from 0"),
        ("top_p", 2, "a number from"),
    ],
    ids=str,
)
def test_damaged_fields_of_generation_config_are_named(tmp_path, name, value, message):
    path = save_checkpoint(tiny_model(), tmp_path)
    (path / "generation_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(ValueError, match=rf"generation_config\.json: {name} must be {message}"):
        kk.Keye.from_pretrained(path)


def test_end_and_padding_tokens_of_config_json_are_used_without_generation_config(tmp_path):
    ids = torch.randint(0, 100, (2, 3), generator=torch.Generator().manual_seed(0))
    free = tiny_model().generate(ids, max_new_tokens=10, eos_token_id=())[:, 3:].tolist()
    end = next(token for token in free[0][:5] if token not in free[1])
    count = free[0].index(end) + 1
    config = {**CONFIG, "eos_token_id": [end, 118], "pad_token_id": 117}
    path = save_checkpoint(tiny_model(), tmp_path, config)
    stopped = kk.Keye.from_pretrained(path).generate(ids, max_new_tokens=10)[:, 3:].tolist()
    assert stopped == [free[0][:count] + [117] * (10 - count), free[1]]
    for values, filler in (({"pad_token_id": 116}, 116), ({"pad_token_id": None, "eos_token_id": None}, 117)):
        (path / "generation_config.json").write_text(json.dumps(values))
        found = kk.Keye.from_pretrained(path).generate(ids, max_new_tokens=10)[:, 3:].tolist()
        assert found == [free[0][:count] + [filler] * (10 - count), free[1]]
    # The argument comes first, then generation_config.json
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": free[0][0]}))
    assert kk.Keye.from_pretrained(path).generate(ids[:1], max_new_tokens=10)[0, 3:].tolist() == free[0][:1]


def test_null_padding_token_is_the_first_end_token():
    model = tiny_model()
    ids = torch.randint(0, 100, (2, 3), generator=torch.Generator().manual_seed(0))
    free = model.generate(ids, max_new_tokens=10, eos_token_id=())[:, 3:].tolist()
    end = next(token for token in free[0][:5] if token not in free[1])
    model.generation_config = {"eos_token_id": end, "pad_token_id": None}
    found = model.generate(ids, max_new_tokens=10)[0, 3:].tolist()
    assert set(found[found.index(end) :]) == {end}
