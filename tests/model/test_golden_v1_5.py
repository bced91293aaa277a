"""Every recorded number of the 1.5 model (tolerances: the README of the golden data)."""

import pytest
import torch
from safetensors.torch import load_file

import keye_kernels as kk
from tests.helpers.golden import golden
from tests.helpers.stages import record_stages

MODEL_CASES = [
    "batch_left_padded",
    "image_then_two_videos",
    "image_upsampled_posemb",
    "text_only_left_padded",
    "two_images",
    "video_all_slow_no_timestamps",
    "video_slow_fast",
]
POSITION_CASES = [*MODEL_CASES, "rope_long_video", "rope_wide_and_tall_images"]
STAGES = {
    "image_patch_embeds": "image.patch_embeds",
    "image_vision_output": "image.post_ln",
    "image_projector_output": "image.projector",
    "video_patch_embeds": "video.patch_embeds",
    "video_vision_output": "video.post_ln",
    "video_projector_output": "video.projector",
    "inputs_embeds": "inputs_embeds",
}
TOWER_TOLERANCE, LOGITS_TOLERANCE = 1e-4, 1e-3
BFLOAT16_RELATIVE_L2 = 0.03


@pytest.fixture(scope="module")
def model():
    return kk.Keye.from_pretrained(golden("v1_5"), dtype=torch.float32)


@pytest.fixture(scope="module")
def cases():
    return load_file(golden("v1_5", "cases.safetensors"))


def split(cases, name, dtype=torch.float32):
    """Inputs and outputs of one case."""
    inputs = {k.removeprefix(f"{name}.in."): v for k, v in cases.items() if k.startswith(f"{name}.in.")}
    outputs = {k.removeprefix(f"{name}.out."): v for k, v in cases.items() if k.startswith(f"{name}.out.")}
    inputs = {k: v.to(dtype) if v.is_floating_point() else v.long() for k, v in inputs.items()}
    assert inputs and outputs
    return inputs, outputs


@pytest.mark.parametrize("name", MODEL_CASES)
def test_every_stage_matches(model, cases, name):
    inputs, outputs = split(cases, name)
    stages = record_stages(model, inputs)
    for theirs, ours in STAGES.items():
        if theirs in outputs:
            torch.testing.assert_close(stages[ours], outputs[theirs], atol=TOWER_TOLERANCE, rtol=0)
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(stages["logits"][mask], outputs["logits"][mask], atol=LOGITS_TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", POSITION_CASES)
def test_positions_are_exact(model, cases, name):
    inputs, outputs = split(cases, name)
    grids = {k: inputs[k] for k in ("image_grid_thw", "video_grid_thw") if k in inputs}
    position_ids, rope_deltas = model.get_rope_index(
        inputs["input_ids"], **grids, attention_mask=inputs["attention_mask"]
    )
    assert torch.equal(position_ids, outputs["position_ids"].long())
    assert torch.equal(rope_deltas, outputs["rope_deltas"].long())


@pytest.mark.parametrize("name", MODEL_CASES)
def test_greedy_tokens_and_their_logits(model, cases, name):
    inputs, outputs = split(cases, name)
    expected = outputs["greedy_tokens"].long()
    tokens = model.generate(**inputs, max_new_tokens=expected.shape[1], eos_token_id=())
    assert torch.equal(tokens[:, inputs["input_ids"].shape[1] :], expected)
    with torch.no_grad():
        cache = model(**inputs).cache
        for step in range(expected.shape[1]):
            logits = model(expected[:, step, None], cache=cache).logits[:, 0]
            torch.testing.assert_close(logits, outputs["decode_logits"][:, step], atol=LOGITS_TOLERANCE, rtol=0)


def test_bfloat16_within_the_allowed_distance(cases):
    model = kk.Keye.from_pretrained(golden("v1_5"), dtype=torch.bfloat16)
    for name in MODEL_CASES:
        inputs, outputs = split(cases, name, torch.bfloat16)
        mask = inputs["attention_mask"].bool()
        stages = record_stages(model, inputs)
        pairs = [(stages[ours], outputs[theirs]) for theirs, ours in STAGES.items() if theirs in outputs]
        for found, expected in [*pairs, (stages["logits"][mask], outputs["logits"][mask])]:
            assert (found.float() - expected).norm() < BFLOAT16_RELATIVE_L2 * expected.norm(), name
