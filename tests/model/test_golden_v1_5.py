"""Every recorded number of Keye-VL-1.5. Tolerances: tests/golden/v1_5/README.md."""

import pytest
import torch

import keye_kernels as kk
from tests.helpers.golden import LOGITS_TOLERANCE, V1_5_CASES, golden, load_case
from tests.helpers.stages import record_stages

POSITION_CASES = [*V1_5_CASES, "rope_long_video", "rope_wide_and_tall_images"]
STAGES = {
    "image_patch_embeds": "image.patch_embeds",
    "image_vision_output": "image.post_ln",
    "image_projector_output": "image.projector",
    "video_patch_embeds": "video.patch_embeds",
    "video_vision_output": "video.post_ln",
    "video_projector_output": "video.projector",
    "inputs_embeds": "inputs_embeds",
}
TOWER_TOLERANCE = 1e-4
BFLOAT16_RELATIVE_L2 = 0.03


@pytest.fixture(scope="module")
def model():
    return kk.Keye.from_pretrained(golden("v1_5"), dtype=torch.float32)


@pytest.mark.parametrize("name", V1_5_CASES)
def test_every_stage_matches(model, name):
    inputs, outputs = load_case("v1_5", name)
    stages = record_stages(model, inputs)
    for theirs, ours in STAGES.items():
        if theirs in outputs:
            torch.testing.assert_close(stages[ours], outputs[theirs], atol=TOWER_TOLERANCE, rtol=0)
    mask = inputs["attention_mask"].bool()
    expected = outputs["logits"][mask]
    torch.testing.assert_close(stages["logits"][mask], expected, atol=LOGITS_TOLERANCE["v1_5"], rtol=0)


@pytest.mark.parametrize("name", POSITION_CASES)
def test_positions_are_exact(model, name):
    inputs, outputs = load_case("v1_5", name)
    grids = {k: inputs[k] for k in ("image_grid_thw", "video_grid_thw") if k in inputs}
    position_ids, rope_deltas = model.get_rope_index(inputs["input_ids"], **grids, attention_mask=inputs["attention_mask"])
    assert torch.equal(position_ids, outputs["position_ids"])
    assert torch.equal(rope_deltas, outputs["rope_deltas"])


@pytest.mark.parametrize("name", V1_5_CASES)
def test_greedy_tokens_and_their_logits(model, name):
    inputs, outputs = load_case("v1_5", name)
    expected = outputs["generated"]
    tokens = model.generate(**inputs, max_new_tokens=expected.shape[1], eos_token_id=())
    assert torch.equal(tokens[:, inputs["input_ids"].shape[1] :], expected)
    with torch.no_grad():
        cache = model(**inputs).cache
        for step in range(expected.shape[1]):
            logits = model(expected[:, step, None], cache=cache).logits[:, 0]
            decode_logits = outputs["decode_logits"][:, step]
            torch.testing.assert_close(logits, decode_logits, atol=LOGITS_TOLERANCE["v1_5"], rtol=0)


def test_bfloat16_within_the_tolerance():
    model = kk.Keye.from_pretrained(golden("v1_5"), dtype=torch.bfloat16)
    for name in V1_5_CASES:
        inputs, outputs = load_case("v1_5", name)
        inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
        mask = inputs["attention_mask"].bool()
        stages = record_stages(model, inputs)
        pairs = [(stages[ours], outputs[theirs]) for theirs, ours in STAGES.items() if theirs in outputs]
        for found, expected in [*pairs, (stages["logits"][mask], outputs["logits"][mask])]:
            assert (found.float() - expected).norm() < BFLOAT16_RELATIVE_L2 * expected.norm(), name
