"""The attention functions that transformers calls, and which implementation they choose."""

import pytest
import torch
from torch import nn

import keye_kernels as kk
from keye_kernels.integrations.transformers import attention
from keye_kernels.integrations.transformers.attention import eager_attention, keye_attention
from tests.helpers.recorded_calls import operator_calls  # noqa: F401  a fixture
from tests.helpers.tiny import prompt

TOKENS, SCALE = 5, 0.4


class Layer(nn.Module):
    num_key_value_groups = 2


def tensors(batch=2, queries=TOKENS, keys=TOKENS):
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, 4, queries, 16), (batch, 2, keys, 16), (batch, 2, keys, 16)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def attend(q, k, v, mask):
    """[B, S, H, D]; `mask` [S, M] bool."""
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    scores = (q @ k.transpose(2, 3) * SCALE).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()


@pytest.fixture
def sdpa_calls(monkeypatch):
    calls, sdpa = [], attention.sdpa_attention_forward
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *a, **k: calls.append(a) or sdpa(*a, **k))
    return calls


@pytest.mark.parametrize(
    ("of_layer", "argument", "mask"),
    [
        (None, None, CAUSAL),
        (True, None, CAUSAL),
        (False, None, CAUSAL | True),
        (False, True, CAUSAL),
        (True, False, CAUSAL | True),
    ],
)
def test_prompts_without_a_mask_are_packed(sdpa_calls, of_layer, argument, mask):
    layer, qkv = Layer(), tensors()
    if of_layer is not None:
        layer.is_causal = of_layer
    found, weights = keye_attention(layer, *qkv, None, scaling=SCALE, is_causal=argument)
    torch.testing.assert_close(found, attend(*qkv, mask), atol=1e-5, rtol=1e-5)
    assert weights is None and not sdpa_calls


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_segments_of_a_collator_replace_the_mask(sdpa_calls, kind):
    """A static cache returns more keys than there are tokens."""
    qkv, offsets = tensors(batch=1, keys=TOKENS + 3), torch.tensor([0, 2, TOKENS], dtype=kind)
    mask = CAUSAL.clone()
    mask[2:, :2] = False
    found, _ = keye_attention(Layer(), *qkv, torch.zeros(()), SCALE, cu_seq_lens_q=offsets, max_length_q=torch.tensor(3))
    q, k, v = qkv
    torch.testing.assert_close(found, attend(q, k[:, :, :TOKENS], v[:, :, :TOKENS], mask), atol=1e-5, rtol=1e-5)
    assert not sdpa_calls


@pytest.mark.parametrize(
    ("queries", "keys", "dropout", "mask"),
    [
        (1, 1, 0.0, torch.ones(1, 1, dtype=torch.bool)),
        (1, TOKENS, 0.0, torch.ones(1, TOKENS, dtype=torch.bool)),
        (2, TOKENS, 0.0, CAUSAL[-2:]),
        (TOKENS, TOKENS, 0.0, CAUSAL.fliplr()),
        (TOKENS, TOKENS, 1e-9, CAUSAL),
    ],
    ids=["first token", "decoding step", "later tokens", "given mask", "dropout"],
)
def test_other_calls_run_sdpa(sdpa_calls, queries, keys, dropout, mask):
    layer, qkv = Layer(), tensors(queries=queries, keys=keys)
    found, _ = keye_attention(layer, *qkv, None if dropout else mask[None, None], scaling=SCALE, dropout=dropout)
    torch.testing.assert_close(found, attend(*qkv, mask), atol=1e-5, rtol=1e-5)
    assert len(sdpa_calls) == 1


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, TOKENS), (2, TOKENS)])
def test_calls_that_are_no_prompts_run_sdpa_without_a_mask_too(sdpa_calls, queries, keys):
    keye_attention(Layer(), *tensors(queries=queries, keys=keys), None, scaling=SCALE)
    assert len(sdpa_calls) == 1


def test_eager_attention_computes_in_float32_and_reads_the_columns_of_the_keys():
    qkv, module = tensors(), Layer()
    bias = torch.zeros(2, 1, TOKENS, TOKENS + 3)
    bias[..., TOKENS:] = torch.nan
    bias[..., :TOKENS].masked_fill_(~CAUSAL, -torch.inf)
    found, weights = eager_attention(module, *qkv, bias, SCALE, dropout=0.0)
    expected = attend(*qkv, CAUSAL)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, TOKENS))
    half, _ = eager_attention(module, *(x.bfloat16() for x in qkv), bias.bfloat16(), SCALE)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("name", "impl"),
    [("eager", "reference"), ("sdpa", "reference"), ("flash_attention_2", "flash_attn"), ("keye", "auto"), ("other", "auto")],
)
def test_the_tower_runs_the_implementation_of_its_name(tiny, operator_calls, name, impl):  # noqa: F811
    tiny.visual.config._attn_implementation = name
    tiny.get_image_features(*(prompt([(1, 4, 4)])[key] for key in ("pixel_values", "image_grid_thw")))
    assert [options["impl"] for operator, _, options in operator_calls if operator == "varlen_attention"] == [impl] * 2


def test_the_text_model_attends_within_the_tokens_of_a_padded_prompt(tiny, operator_calls):  # noqa: F811
    tiny.set_attn_implementation("keye")
    ids, mask = torch.arange(8).view(2, 4), torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    tiny(ids, attention_mask=mask)
    offsets = [arguments[3].tolist() for name, arguments, _ in operator_calls if name == "varlen_attention"]
    assert offsets == [[0, 1, 4, 4, 4, 6, 8]] * 2
    operator_calls.clear()
    cache = tiny(ids[:, :2]).past_key_values
    tiny(ids[:, 2:], past_key_values=cache, attention_mask=torch.ones(2, 4))
    assert [n for n, *_ in operator_calls].count("varlen_attention") == 2  # the second call runs SDPA


def test_both_kinds_of_models_call_the_operators_alike(tiny, tiny_folder, operator_calls):  # noqa: F811
    """Frequencies, sections, eps and implementation."""
    tiny.set_attn_implementation("keye")
    calls = []
    for model in (tiny, kk.Keye.from_pretrained(tiny_folder)):
        operator_calls.clear()
        model(**prompt([(1, 4, 4)]))
        calls.append([call for call in operator_calls if call[0] != "varlen_attention"])
    assert [name for name, *_ in calls[0]] == [name for name, *_ in calls[1]]
    for (name, one, options), (_, other, expected) in zip(*calls, strict=True):
        tensors = [[x for x in arguments if isinstance(x, torch.Tensor)] for arguments in (one, other)]
        torch.testing.assert_close(*tensors, atol=1e-4, rtol=1e-4)
        for key in ("eps", "merge_size"):
            assert options.get(key) == expected.get(key), (name, key)
        assert options.get("impl", "auto") == expected["impl"] == "auto", name
