"""Compares `AutoModelForImageTextToText` with recorded results of the official code."""

import pytest
import torch

from tests.helpers.golden import CASES, LOGITS_TOLERANCE, load_case, token_mask

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def check(model, edition, name):
    inputs, outputs = load_case(edition, name)
    mask = token_mask(inputs)
    with torch.no_grad():
        output = model(**inputs)
    torch.testing.assert_close(output.logits[mask], outputs["logits"][mask], atol=LOGITS_TOLERANCE[edition], rtol=0)
    assert torch.equal(output.rope_deltas, outputs["rope_deltas"])
    length, steps = inputs["input_ids"].shape[1], outputs["generated"].shape[1]
    found = model.generate(**inputs, max_new_tokens=steps, **GREEDY)[:, length:]
    assert torch.equal(found, outputs["generated"])


@pytest.mark.parametrize(("edition", "name"), CASES)
def test_logits_and_tokens_match_the_official_code(request, edition, name):
    check(request.getfixturevalue(edition), edition, name)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "keye"])
@pytest.mark.parametrize("name", ["c_batch_left_pad", "d3_two_videos"])
def test_every_attention_implementation_matches_the_official_code(preview, name, implementation):
    preview.set_attn_implementation(implementation)
    try:
        check(preview, "preview", name)
    finally:
        preview.set_attn_implementation({"": "sdpa", "vision_config": "keye"})
