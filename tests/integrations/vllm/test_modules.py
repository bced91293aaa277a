"""The modules that replace vLLM's, with stubs in place of vLLM's classes. Runs without vLLM."""

import importlib
import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from keye_kernels.integrations import vllm as plugin
from tests.helpers.tiny import prompt, tiny_model

EDITIONS = ["Keye", "KeyeVL1_5"]
MODELS = "keye_kernels.integrations.vllm.models"
GRIDS = [(1, 4, 6), (2, 4, 4), (1, 2, 2)]


class Loader:
    """The part of vLLM's model classes that the plugin relies on: it builds a tower and a projector."""

    def __init__(self, *, vllm_config, prefix=""):
        self.config, self.visual = vllm_config.config, vllm_config.visual
        self.mlp_AR = self._build_projector(vllm_config.config)

    def _build_projector(self, text_config):
        return "vLLM's projector"

    def load_weights(self, weights):
        return {name for name, _ in weights}


def stub_modules():
    """Modules with the names that `models` imports."""

    def register_processor(processor, **options):
        def register(model):
            model.registered = processor, options
            return model

        return register

    modules = {name: ModuleType(name) for name in ("vllm", "vllm.config", "vllm.model_executor", "vllm.multimodal")}
    modules["vllm.config"].VllmConfig = SimpleNamespace
    modules["vllm.multimodal"].MULTIMODAL_REGISTRY = SimpleNamespace(register_processor=register_processor)
    found = modules["vllm.model_executor.models"] = ModuleType("vllm.model_executor.models")
    for name, prefix in (("keye", "Keye"), ("keye_vl1_5", "KeyeVL1_5")):
        module = ModuleType(f"vllm.model_executor.models.{name}")
        for suffix in ("MultiModalProcessor", "ProcessingInfo", "DummyInputsBuilder"):
            setattr(module, prefix + suffix, prefix + suffix)
        setattr(module, f"{prefix}ForConditionalGeneration", type(f"{prefix}ForConditionalGeneration", (Loader,), {}))
        modules[module.__name__] = module
        setattr(found, name, module)
    keye = found.keye
    for name in ("KeyeSiglipAttention", "KeyeSiglipEncoderLayer", "KeyeSiglipVisionTransformer", "KeyeSiglipVisionModel"):
        setattr(keye, name, type(name, (nn.Module,), {}))
    return modules


@pytest.fixture
def models(monkeypatch):
    for name, module in stub_modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, MODELS, raising=False)
    module = importlib.import_module(MODELS)
    yield module
    sys.modules.pop(MODELS, None)
    del plugin.models


class ReturnsBias(nn.Module):
    """vLLM's linear layers return their output and a bias, or None."""

    def __init__(self, forward):
        super().__init__()
        self.run = forward

    def forward(self, x):
        return self.run(x), None


def vllm_tower(lean):
    """A tower with vLLM's names and the weights of the lean model, which computes nothing itself."""

    def module(**children):
        made = nn.Module()
        for name, child in children.items():
            setattr(made, name, child)
        return made

    def layer(source):
        qkv, out = source.self_attn.qkv_proj, source.self_attn.out_proj
        attention = module(qkv_proj=ReturnsBias(lambda x: torch.cat(qkv(x), dim=-1)), out_proj=ReturnsBias(out))
        attention.head_dim = source.self_attn.head_dim
        return module(layer_norm1=source.layer_norm1, layer_norm2=source.layer_norm2, mlp=source.mlp, self_attn=attention)

    tower = lean.visual
    embed = module(position_embedding=tower.position_embedding)
    embed.patch_embedding = lambda patches: tower._embed_patches(patches)[..., None, None]
    made = module(
        embeddings=embed,
        encoder=module(layers=nn.ModuleList(map(layer, tower.layers))),
        post_layernorm=tower.post_layernorm,
    )
    made.config = SimpleNamespace(lean=lambda: lean.config.vision_config)
    return made


def vllm_config(models, lean, quant_config=None, lora_config=None, has_tower=True):
    visual = models.keye.KeyeSiglipVisionModel() if has_tower else nn.Identity()
    visual.vision_model = vllm_tower(lean)
    config = SimpleNamespace(lean=lambda: lean.config, model_type=lean.config.model_type)
    return SimpleNamespace(config=config, visual=visual, quant_config=quant_config, lora_config=lora_config)


def class_of(models, model_type):
    return getattr(models, f"{model_type}ForConditionalGeneration")


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
def test_vllms_projector_gets_the_features_of_each_grid_in_raster_order(models, model_type, options):
    lean = tiny_model(model_type=model_type)
    model = class_of(models, model_type)(vllm_config=vllm_config(models, lean, **options))
    assert model.mlp_AR == "vLLM's projector"
    with torch.no_grad():
        found = model.visual.vision_model(patches(), GRIDS)
        batch = lean.visual.geometry(torch.tensor(GRIDS), len(patches()))
        in_blocks = lean.visual(patches(), batch)
    expected = torch.empty_like(in_blocks)
    expected[batch.raster_index] = in_blocks
    assert not torch.allclose(expected, in_blocks, atol=1e-3)
    for features, part in zip(found, expected.split([t * h * w for t, h, w in GRIDS]), strict=True):
        torch.testing.assert_close(features, part, atol=1e-5, rtol=1e-5)


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
