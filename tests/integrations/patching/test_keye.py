"""Options of Keye's own code, and patching of only a part of it."""

import pytest
import torch
from torch import nn

import keye_kernels as kk
from keye_kernels.integrations.patching.patch import patched_parts
from tests.helpers.patched_families import IMAGE_GRIDS, batch, build

FLOAT32 = {"atol": 1e-5, "rtol": 1e-5}
PATCHES = sum(t * h * w for t, h, w in IMAGE_GRIDS)


@pytest.fixture
def model() -> nn.Module:
    return build("keye")


def encode(model: nn.Module, **options) -> tuple[torch.Tensor, tuple]:
    offsets = torch.tensor([0, 24, PATCHES], dtype=torch.int32)
    x = torch.randn(1, PATCHES, 144, generator=torch.Generator().manual_seed(2))
    arguments = {"inputs_embeds": x, "cu_seqlens": offsets, "image_grid_thw": list(IMAGE_GRIDS), "use_rope": True}
    with torch.no_grad():
        return model.visual.vision_model.encoder(**arguments | options)


@pytest.mark.parametrize(
    "options",
    [
        {"image_grid_thw": [[(2, 2, 6), (1, 4, 4)], (1, 4, 4)]},
        {"cu_seqlens": torch.tensor([0, 24, 40, 56])},
        {"use_rope": False},
        {"height_position_ids": torch.arange(PATCHES), "width_position_ids": torch.arange(PATCHES) // 3},
        {"output_attentions": True},
    ],
    ids=["nested-grids", "segments-by-frame", "no-rope", "caller-positions", "attention-weights"],
)
def test_encoder_options_work_after_patching(model, options):
    expected, weights = encode(model, **options)
    kk.apply_keye_kernels(model, strict=True)
    found, found_weights = encode(model, **options)
    torch.testing.assert_close(found, expected, **FLOAT32)
    torch.testing.assert_close(found_weights, weights, **FLOAT32)


def test_attention_ignores_neighbouring_images(model):
    kk.apply_keye_kernels(model, strict=True)
    x = torch.randn(1, PATCHES, 144)
    changed = x.clone()
    changed[:, 24:] += 1
    before, after = (encode(model, inputs_embeds=inputs)[0] for inputs in (x, changed))
    assert torch.equal(before[:, :24], after[:, :24])
    assert not torch.equal(before[:, 24:], after[:, 24:])


def test_projector_runs_its_own_forward_on_a_tensor_in_block_order(model):
    x = torch.randn(24, 144)
    expected = model.mlp_AR(x, None)
    kk.apply_keye_kernels(model)
    assert torch.equal(model.mlp_AR(x, None), expected)


def test_rope_and_attention_can_be_replaced_in_two_calls(model):
    kk.apply_keye_kernels(model, rope=False)
    assert not any(item.missing for item in kk.apply_keye_kernels(model, attention=False).left_alone)
    together = build("keye")
    kk.apply_keye_kernels(together)
    inputs = batch("keye")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, together(**inputs).logits)


def test_reverting_attention_reverts_the_rope_that_depends_on_it(model):
    inputs = batch("keye")
    with torch.no_grad():
        expected = model(**inputs).logits
        with kk.apply_keye_kernels(model, rope=False):
            kk.apply_keye_kernels(model)
        assert patched_parts(model.model.rotary_emb) == {"rope"}
        assert not any(patched_parts(module) for module in model.visual.modules())
        torch.testing.assert_close(model(**inputs).logits, expected, **FLOAT32)


def test_one_layer_of_the_tower_can_be_reverted_alone(model):
    inputs, layers = batch("keye"), model.visual.vision_model.encoder.layers
    with torch.no_grad():
        expected = model(**inputs).logits
        with kk.apply_keye_kernels(layers[1], rope=False):
            kk.apply_keye_kernels(model)
        assert patched_parts(layers[0].self_attn) and not patched_parts(layers[1].self_attn)
        torch.testing.assert_close(model(**inputs).logits, expected, **FLOAT32)
        kk.revert_keye_kernels(layers[0])
        torch.testing.assert_close(model(**inputs).logits, expected, **FLOAT32)


@pytest.mark.parametrize("part", ["layers.0", "layers.0.self_attn"])
def test_rope_of_a_single_layer_is_not_replaced(model, part):
    """Its cos and sin come from outside."""
    inputs = batch("keye")
    with torch.no_grad():
        expected = model(**inputs).logits
        report = kk.apply_keye_kernels(model.model.get_submodule(part))
        assert not report.replaced
        assert torch.equal(model(**inputs).logits, expected)
