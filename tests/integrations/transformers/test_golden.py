"""The recorded numbers of the official code through `AutoModelForImageTextToText`, without `trust_remote_code`."""

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.golden import golden
from tests.model.test_golden_preview import CASES, TOLERANCES, inputs_of
from tests.model.test_golden_v1_5 import LOGITS_TOLERANCE, MODEL_CASES, split

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def check(model, inputs, logits, tokens, tolerance):
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    with torch.no_grad():
        output = model(**inputs)
    torch.testing.assert_close(output.logits[mask], logits[mask], atol=tolerance, rtol=0)
    length = inputs["input_ids"].shape[1]
    found = model.generate(**inputs, max_new_tokens=tokens.shape[1], **GREEDY)[:, length:]
    assert torch.equal(found, tokens)
    return output


@pytest.mark.parametrize("name", CASES)
def test_preview_gives_the_official_logits_and_tokens(preview, name):
    case = load_file(golden("preview", f"case_{name}.safetensors"))
    output = check(preview, inputs_of(case), case["logits"], case["generated"], TOLERANCES["logits"])
    assert torch.equal(output.rope_deltas, case["rope_deltas"])


@pytest.mark.parametrize("name", MODEL_CASES)
def test_1_5_gives_the_official_logits_and_tokens(v1_5, name):
    inputs, outputs = split(load_file(golden("v1_5", "cases.safetensors")), name)
    output = check(v1_5, inputs, outputs["logits"], outputs["greedy_tokens"].long(), LOGITS_TOLERANCE)
    assert torch.equal(output.rope_deltas, outputs["rope_deltas"].long())


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "keye"])
@pytest.mark.parametrize("name", ["c_batch_left_pad", "d3_two_videos"])
def test_every_attention_gives_the_official_logits_and_tokens(preview, name, implementation):
    case = load_file(golden("preview", f"case_{name}.safetensors"))
    preview.set_attn_implementation(implementation)
    try:
        check(preview, inputs_of(case), case["logits"], case["generated"], TOLERANCES["logits"])
    finally:
        preview.set_attn_implementation({"": "sdpa", "vision_config": "keye"})
