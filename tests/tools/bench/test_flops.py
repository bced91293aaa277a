"""Estimated FLOPs against those that torch counts."""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from keye_kernels import reference
from keye_kernels.model import Keye, KeyeConfig
from keye_kernels.tools.bench.flops import estimate_flops
from tests.helpers.tiny import CONFIG, prompt, tiny_model

GRIDS = [(1, 4, 6), (2, 2, 4)]


@pytest.fixture
def counted(monkeypatch):
    """A function that runs a model and returns the FLOPs of linear layers and of attention.

    torch's counter does not see inside a custom operator, so each operator runs under a counter of its own. The counter does not
    know fused attention on a CPU, nor oneDNN's matmuls, so both are switched off.
    """
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    inner = []

    def count_inside(function):
        def run(*arguments):
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                result = function(*arguments)
            inner.append(counter)
            return result

        return run

    for name in ("varlen_attention", "patch_merge_projection"):
        monkeypatch.setattr(reference, name, count_inside(getattr(reference, name)))

    def count(model, inputs, new_tokens):
        with FlopCounterMode(display=False) as outer, sdpa_kernel(SDPBackend.MATH):
            model.generate(**inputs, max_new_tokens=new_tokens, eos_token_id=())
        by_operator = Counter()
        for counter in (outer, *inner):
            by_operator.update({str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()})
        attention = sum(flops for name, flops in by_operator.items() if "bmm" in name)
        return sum(by_operator.values()) - attention, attention

    return count


@pytest.mark.parametrize("edition", ["Keye", "KeyeVL1_5"])
def test_linear_flops_match_torch(edition, counted):
    model, inputs = tiny_model(model_type=edition), prompt(GRIDS)
    length = inputs["input_ids"].shape[1]
    estimate = estimate_flops(model.config, GRIDS, length, new_tokens=3)
    linear, _ = counted(model, inputs, 3)
    parts = (estimate.vision_linear, estimate.projector, estimate.decoder_linear, estimate.head)
    assert sum(parts) == linear


@pytest.mark.parametrize("edition", ["Keye", "KeyeVL1_5"])
def test_attention_flops_match_torch_without_masked_scores(edition, counted):
    model, inputs = tiny_model(model_type=edition), prompt(GRIDS)
    length = inputs["input_ids"].shape[1]
    estimate = estimate_flops(model.config, GRIDS, length)
    # torch computes all length x length scores of the prompt; causal attention needs length x (length + 1) / 2
    square = estimate.decoder_attention * 2 * length // (length + 1)
    assert estimate.vision_attention + square == counted(model, inputs, 1)[1]


def test_each_decoding_step_attends_to_all_tokens_before_it():
    config = KeyeConfig.from_dict(CONFIG)
    steps = [estimate_flops(config, [], 10, new_tokens=n).decoder_attention for n in (1, 2, 3)]
    flops_per_key = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    assert [b - a for a, b in pairwise(steps)] == [11 * flops_per_key, 12 * flops_per_key]


def test_keye_1_5_attends_within_frames():
    preview, frames = (KeyeConfig(model_type=name) for name in ("Keye", "KeyeVL1_5"))
    clip = [(8, 20, 20)]
    whole, split = (estimate_flops(config, clip, 900).vision_attention for config in (preview, frames))
    assert whole == 8 * split


def test_full_model_needs_two_flops_per_weight_and_token():
    with torch.device("meta"):
        model = Keye(KeyeConfig())
    # Without the embedding: a lookup, not a matmul
    weights = sum(p.numel() for p in (*model.model.layers.parameters(), *model.lm_head.parameters()) if p.ndim > 1)
    estimate = estimate_flops(KeyeConfig(), [], 1)
    assert estimate.decoder_linear + estimate.head == 2 * weights


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([(1, 3, 4)], 50), "grids must have .* divisible by 2"),
        (([(1, 4, 4)], 3), "prompt_tokens must be at least the 4"),
        (([], 5, 0), "new_tokens must be at least 1"),
    ],
)
def test_invalid_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        estimate_flops(KeyeConfig(), *arguments)
