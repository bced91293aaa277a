"""Estimated FLOPs against those that torch counts while a model runs."""

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
    """A function that runs a model and gives FLOPs: of linear layers, of attention.

    A counter does not look into a registered operator, so each gets one within; it knows fused attention on a GPU only, and
    no product of oneDNN's.
    """
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    inner = []

    def count_within(function):
        def run(*arguments):
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                result = function(*arguments)
            inner.append(counter)
            return result

        return run

    for name in ("varlen_attention", "patch_merge_projection"):
        monkeypatch.setattr(reference, name, count_within(getattr(reference, name)))

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
def test_linear_flops_are_those_that_torch_counts(edition, counted):
    model, inputs = tiny_model(model_type=edition), prompt(GRIDS)
    length = inputs["input_ids"].shape[1]
    estimate = estimate_flops(model.config, GRIDS, length, new_tokens=3)
    linear, _ = counted(model, inputs, 3)
    parts = (estimate.vision_linear, estimate.projector, estimate.decoder_linear, estimate.head)
    assert sum(parts) == linear


@pytest.mark.parametrize("edition", ["Keye", "KeyeVL1_5"])
def test_attention_flops_are_those_that_torch_counts_without_the_masked_half(edition, counted):
    model, inputs = tiny_model(model_type=edition), prompt(GRIDS)
    length = inputs["input_ids"].shape[1]
    estimate = estimate_flops(model.config, GRIDS, length)
    # torch multiplies the whole square of the prompt, of which (length + 1) / 2 of every length columns are needed
    square = estimate.decoder_attention * 2 * length // (length + 1)
    assert estimate.vision_attention + square == counted(model, inputs, 1)[1]


def test_each_further_token_attends_to_all_before_it():
    config = KeyeConfig.from_dict(CONFIG)
    steps = [estimate_flops(config, [], 10, new_tokens=n).decoder_attention for n in (1, 2, 3)]
    by_key = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    assert [b - a for a, b in pairwise(steps)] == [11 * by_key, 12 * by_key]


def test_frames_of_keye_1_5_attend_within_themselves():
    preview, frames = (KeyeConfig(model_type=name) for name in ("Keye", "KeyeVL1_5"))
    clip = [(8, 20, 20)]
    whole, split = (estimate_flops(config, clip, 900).vision_attention for config in (preview, frames))
    assert whole == 8 * split


def test_the_real_model_costs_twice_its_weights_a_token():
    with torch.device("meta"):
        model = Keye(KeyeConfig())
    # All but the embedding, which is looked up, not multiplied
    weights = sum(p.numel() for p in (*model.model.layers.parameters(), *model.lm_head.parameters()) if p.ndim > 1)
    estimate = estimate_flops(KeyeConfig(), [], 1)
    assert estimate.decoder_linear + estimate.head == 2 * weights


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([(1, 3, 4)], 50), "grids must hold .* divisible by 2"),
        (([(1, 4, 4)], 3), "prompt_tokens must be at least the 4"),
        (([], 5, 0), "new_tokens must be at least 1"),
    ],
)
def test_impossible_requests_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        estimate_flops(KeyeConfig(), *arguments)
