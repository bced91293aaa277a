"""Every recorded number of the official Preview code (tolerances: the README of the golden data)."""

import pytest
import torch
from safetensors.torch import load_file

import keye_kernels as kk
from tests.helpers.golden import golden
from tests.helpers.stages import record_stages

CASES = [
    "a_one_image",
    "b_two_images",
    "c_batch_left_pad",
    "d1_video_ts_0_5",
    "d2_video_ts_0_75",
    "d3_two_videos",
    "e_image_video_mixed",
    "f1_text_only",
    "f2_text_only_left_pad",
]
INPUTS = (
    "input_ids",
    "attention_mask",
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
    "second_per_grid_ts",
)
TOLERANCES = {
    "image.patch_embeds": 1e-5,
    "image.layer0": 3e-5,
    "image.post_ln": 1e-5,
    "image.projector": 1e-5,
    "video.patch_embeds": 1e-5,
    "video.layer0": 3e-5,
    "video.post_ln": 1e-5,
    "video.projector": 1e-5,
    "inputs_embeds": 1e-5,
    "text_layer0": 3e-5,
    "final_hidden": 1e-4,
    "logits": 1e-4,
}
GENERATED_LOGITS_TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def model():
    return kk.Keye.from_pretrained(golden("preview"), dtype=torch.float32)


def inputs_of(case):
    return {name: case[name] for name in INPUTS if name in case}


@pytest.mark.parametrize("name", CASES)
def test_every_stage_matches_the_official_code(model, name):
    case = load_file(golden("preview", f"case_{name}.safetensors"))
    inputs = inputs_of(case)
    stages = record_stages(model, inputs)
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    compared = [stage for stage in TOLERANCES if stage in case]
    assert set(compared) <= stages.keys() and len(compared) >= 4
    for stage in compared:
        expected, found = case[stage], stages[stage]
        if stage in ("text_layer0", "final_hidden", "logits"):
            expected, found = expected[mask], found[mask]
        torch.testing.assert_close(
            found, expected, atol=TOLERANCES[stage], rtol=0, msg=lambda text, stage=stage: f"{stage}: {text}"
        )


@pytest.mark.parametrize("name", CASES)
def test_positions_are_exact(model, name):
    case = load_file(golden("preview", f"case_{name}.safetensors"))
    inputs = inputs_of(case)
    inputs = {key: value for key, value in inputs.items() if not key.startswith("pixel_values")}
    position_ids, rope_deltas = model.get_rope_index(**inputs)
    assert torch.equal(position_ids, case["position_ids"])
    assert torch.equal(rope_deltas, case["rope_deltas"])


def rope_index_cases():
    case = load_file(golden("preview", "case_rope_index.safetensors"))
    names = sorted({key.partition(".")[0] for key in case})
    assert len(names) == 17
    return {name: {key.partition(".")[2]: case[key] for key in case if key.startswith(name + ".")} for name in names}


def test_rope_index_cases_are_exact():
    from keye_kernels.model.positions import rope_index

    config = kk.KeyeConfig.from_pretrained(golden("preview", "config.json").parent)
    optional = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "attention_mask")
    for name, case in rope_index_cases().items():
        position_ids, rope_deltas = rope_index(config, case["input_ids"], *(case.get(key) for key in optional))
        assert torch.equal(position_ids, case["position_ids"]), name
        assert torch.equal(rope_deltas, case["rope_deltas"]), name


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_are_exact(model, name):
    case = load_file(golden("preview", f"case_{name}.safetensors"))
    inputs = inputs_of(case)
    tokens = model.generate(**inputs, max_new_tokens=16, eos_token_id=())
    length = inputs["input_ids"].shape[1]
    assert torch.equal(tokens[:, :length], inputs["input_ids"])
    assert torch.equal(tokens[:, length:], case["generated"])


@pytest.mark.parametrize("name", CASES)
def test_logits_of_every_decoding_step(model, name):
    case = load_file(golden("preview", f"case_{name}.safetensors"))
    with torch.no_grad():
        output = model(**inputs_of(case), logits_to_keep=1)
        for step, token in enumerate(case["generated"].unbind(1)):
            expected = case["generated_logits"][:, step]
            torch.testing.assert_close(output.logits[:, -1], expected, atol=GENERATED_LOGITS_TOLERANCE, rtol=0)
            output = model(token[:, None], cache=output.cache)


def test_bfloat16_stays_as_near_as_the_official_code():
    """Its own largest and mean deviation: post_ln 0.009 / 0.0008, projector 0.006 / 0.0009, logits 0.18 / 0.022."""
    model = kk.Keye.from_pretrained(golden("preview"), dtype=torch.bfloat16)
    for name in CASES:
        case = load_file(golden("preview", f"case_{name}.safetensors"))
        inputs = inputs_of(case)
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        stages = record_stages(model, inputs)
        for stage, largest, mean in (("post_ln", 0.009, 0.0008), ("projector", 0.006, 0.0009), ("logits", 0.18, 0.022)):
            for key in (k for k in case if k.rpartition(".")[2] == stage):
                error = (stages[key].float() - case[key]).abs()
                error = error[mask] if key == "logits" else error
                assert error.max() < 2 * largest and error.mean() < 1.5 * mean, (name, key, error.max(), error.mean())
