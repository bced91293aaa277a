"""The modules that replace vLLM's, with stubs in place of vLLM's classes. Runs without vLLM."""

import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from keye_kernels.integrations import vllm as plugin
from tests.helpers.tiny import prompt, tiny_model

from .stubs import MODELS, ReturnsBias, class_of, vllm_config

EDITIONS = ["Keye", "KeyeVL1_5"]
GRIDS = [(1, 4, 6), (2, 4, 4), (1, 2, 2)]


def patches():
    return torch.cat([prompt([grid], seed=seed)["pixel_values"] for seed, grid in enumerate(GRIDS)])


@pytest.mark.parametrize("model_type", EDITIONS)
def test_tower_and_projector_give_the_embeddings_of_the_lean_model(models, model_type):
    lean = tiny_model(model_type=model_type)
    model = class_of(models, model_type)(vllm_config=vllm_config(models, lean))
    assert model.mlp_AR.impl == "auto"
    model.mlp_AR.load_state_dict(lean.mlp_AR.state_dict())
    with torch.no_grad():
        encoded = model.visual.vision_model(patches(), GRIDS, cu_seqlens="ignored")
        found = model.mlp_AR(encoded, torch.tensor(GRIDS))
        expected = lean.get_image_features(patches(), torch.tensor(GRIDS))
    assert [len(features) for features in found] == [t * h * w // 4 for t, h, w in GRIDS]
    torch.testing.assert_close(torch.cat(found), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", EDITIONS)
@pytest.mark.parametrize(
    "options",
    [{"quant_config": "fp8"}, {"lora_config": SimpleNamespace(enable_tower_connector_lora=True)}],
    ids=["quantized", "lora"],
)
def test_vllms_projector_gets_the_patches_of_all_images(models, model_type, options):
    """vLLM's linear layers may be quantized or have LoRA."""
    lean = tiny_model(model_type=model_type)
    model = class_of(models, model_type)(vllm_config=vllm_config(models, lean, **options))
    assert isinstance(model.mlp_AR, models.VllmProjector) and isinstance(model.mlp_AR.linear_1, ReturnsBias)
    with torch.no_grad():
        found = model.mlp_AR(model.visual.vision_model(patches(), GRIDS), torch.tensor(GRIDS))
        expected = lean.get_image_features(patches(), torch.tensor(GRIDS))
    assert [len(features) for features in found] == [t * h * w // 4 for t, h, w in GRIDS]
    torch.testing.assert_close(torch.cat(found), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "position embedding, rope and attention of 2 vision layers, projector ("),
        ({"lora_config": SimpleNamespace(enable_tower_connector_lora=False)}, "of 2 vision layers, projector ("),
        ({"quant_config": "fp8"}, "of 2 vision layers ("),
        ({"quant_config": "fp8", "has_tower": False}, "nothing, the model has no vision tower ("),
    ],
    ids=["all", "lora of the text model", "quantized", "no images"],
)
def test_the_log_names_what_was_replaced(models, caplog, options, message):
    with caplog.at_level(logging.INFO, logger="vllm.keye_kernels"):
        config = vllm_config(models, tiny_model(), **options)
        model = models.KeyeForConditionalGeneration(vllm_config=config)
    assert message in caplog.text and "KeyeForConditionalGeneration" in caplog.text
    replaced = isinstance(model.visual.vision_model, models.VisionTransformer)
    assert replaced == options.get("has_tower", True)


def test_the_unused_table_counts_as_loaded(models):
    model = models.KeyeForConditionalGeneration(vllm_config=vllm_config(models, tiny_model()))
    assert model.load_weights([("a", None)]) == {
        "a",
        "visual.vision_model.embeddings.packing_position_embedding.weight",
    }


def test_classes_keep_the_processors_of_their_edition(models):
    for name, prefix in (("KeyeForConditionalGeneration", "Keye"), ("KeyeVL1_5ForConditionalGeneration", "KeyeVL1_5")):
        processor, options = getattr(models, name).registered
        assert processor == f"{prefix}MultiModalProcessor"
        assert options == {"info": f"{prefix}ProcessingInfo", "dummy_inputs": f"{prefix}DummyInputsBuilder"}


def test_one_rank_has_some_of_the_heads(models):
    """Tensor parallelism: the projection returns q, k and v of the heads of this rank."""
    lean = tiny_model()
    source, attention = lean.visual.layers[0].self_attn, nn.Module()
    q, k, v = (part[24:] for part in source.qkv_proj.weight.split(48))
    weight, bias = torch.cat((q, k, v)), torch.cat([part[24:] for part in source.qkv_proj.bias.split(48)])
    attention.qkv_proj = ReturnsBias(lambda x: nn.functional.linear(x, weight, bias))
    attention.out_proj, attention.head_dim = ReturnsBias(lambda x: x), 24
    batch, x = lean.visual.geometry(torch.tensor(GRIDS), len(patches())), torch.randn(len(patches()), 48)
    inv_freq = torch.rand(6)
    with torch.no_grad():
        found = models.VisionAttention(attention)(x, batch, inv_freq)
        source.out_proj = nn.Identity()
        expected = source(x, batch, inv_freq)[:, 24:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("off", [False, True])
def test_registration_names_the_class_of_each_edition(monkeypatch, off):
    registered, vllm = {}, ModuleType("vllm")
    vllm.ModelRegistry = SimpleNamespace(register_model=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(plugin, "require", lambda *_, **__: None)
    monkeypatch.setenv(plugin.ENVIRONMENT_VARIABLE, "0" if off else "1")
    plugin.register()
    names = ["KeyeForConditionalGeneration", "KeyeVL1_5ForConditionalGeneration"]
    assert registered == ({} if off else {name: f"{MODELS}:{name}" for name in names})
