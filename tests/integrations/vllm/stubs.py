"""Stubs in place of vLLM's classes, with the attributes that the plugin relies on."""

import importlib
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import torch
from torch import nn

from keye_kernels.integrations import vllm as plugin

SUBMODULES = ("models", "encoder_graph")
MODELS = f"{plugin.__name__}.models"


@contextmanager
def stubbed_models(monkeypatch):
    """Imports the module `models` of the plugin with stubs in place of vLLM's classes."""
    for name, stub in stub_modules().items():
        monkeypatch.setitem(sys.modules, name, stub)
    for name in SUBMODULES:
        monkeypatch.delitem(sys.modules, f"{plugin.__name__}.{name}", raising=False)
    yield importlib.import_module(MODELS)
    for name in SUBMODULES:
        del sys.modules[f"{plugin.__name__}.{name}"]
        delattr(plugin, name)


class Loader:
    """The part of vLLM's model classes that the plugin relies on: it builds a tower and a projector."""

    def __init__(self, *, vllm_config, prefix=""):
        self.config, self.visual = vllm_config.config, vllm_config.visual
        self.mlp_AR = self._build_projector(vllm_config.config, lean=vllm_config.lean)

    def _build_projector(self, text_config, lean):
        source = lean.mlp_AR
        layers = {"linear_1": ReturnsBias(source.linear_1), "linear_2": ReturnsBias(source.linear_2)}
        return module(pre_norm=source.pre_norm, act=nn.GELU(), **layers)

    def load_weights(self, weights):
        return {name for name, _ in weights}


class UnquantizedLinearMethod:
    _gemm_impl = staticmethod(nn.functional.linear)


class ColumnParallelLinear(nn.Linear):
    """The attributes of vLLM's, which returns its output and a bias, or None."""

    gather_output = skip_bias_add = False

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.quant_method = UnquantizedLinearMethod()

    def forward(self, x):
        return super().forward(x), None


@dataclass
class EncoderItemSpec:
    input_size: int
    output_tokens: int


@dataclass
class EncoderCudaGraphConfig:
    modalities: list
    buffer_keys: list
    out_hidden_size: int
    padding_logics: dict


@dataclass
class Buffers:
    values: dict


class SupportsEncoderCudaGraph:
    pass


def stub_modules():
    """Modules with the names that `models` imports."""

    def register_processor(processor, **options):
        def register(model):
            model.registered = processor, options
            return model

        return register

    names = ["vllm", "vllm.config", "vllm.model_executor", "vllm.multimodal", "vllm.model_executor.layers"]
    names += ["vllm.model_executor.layers.linear", "vllm.model_executor.layers.utils", "vllm.v1", "vllm.v1.worker"]
    names += ["vllm.v1.worker.encoder_cudagraph_defs", "vllm.model_executor.models.interfaces"]
    modules = {name: ModuleType(name) for name in names}
    modules["vllm"].envs = SimpleNamespace(VLLM_BATCH_INVARIANT=False)
    modules["vllm.model_executor.layers.linear"].ColumnParallelLinear = ColumnParallelLinear
    modules["vllm.model_executor.layers.linear"].UnquantizedLinearMethod = UnquantizedLinearMethod
    modules["vllm.model_executor.layers.utils"].default_unquantized_gemm = nn.functional.linear
    modules["vllm.model_executor.models.interfaces"].SupportsEncoderCudaGraph = SupportsEncoderCudaGraph
    graphs = modules["vllm.v1.worker.encoder_cudagraph_defs"]
    graphs.EncoderItemSpec, graphs.EncoderCudaGraphConfig = EncoderItemSpec, EncoderCudaGraphConfig
    graphs.EncoderCudaGraphCaptureInputs = graphs.EncoderCudaGraphReplayBuffers = Buffers
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
    keye.KeyeSiglipVisionModel = VisionModel
    for name in ("KeyeSiglipAttention", "KeyeSiglipEncoderLayer", "KeyeSiglipVisionTransformer"):
        setattr(keye, name, type(name, (nn.Module,), {}))
    return modules


class VisionModel(nn.Module):
    """vLLM's module around the tower."""

    def forward(self, pixel_values, image_grid_thw=None, position_ids=None):
        return self.vision_model(pixel_values=pixel_values, image_grid_thw=image_grid_thw, position_ids=position_ids)


class ReturnsBias(nn.Module):
    """vLLM's linear layers return their output and a bias, or None."""

    def __init__(self, forward):
        super().__init__()
        self.run = forward

    def forward(self, x):
        return self.run(x), None


class PatchEmbedding(nn.Module):
    """A convolution with the weights of the lean tower."""

    def __init__(self, tower):
        super().__init__()
        self.embed, self.weight = tower._embed_patches, tower.patch_embedding.weight.view(-1, 3, 14, 14)

    def forward(self, patches):
        return self.embed(patches)[..., None, None]


class MLP(nn.Module):
    """vLLM's MLP with the weights of two linear layers."""

    def __init__(self, fc1, fc2):
        super().__init__()
        self.fc1 = ColumnParallelLinear(fc1.in_features, fc1.out_features)
        self.fc1.load_state_dict(fc1.state_dict())
        self.activation_fn, self.fc2 = nn.GELU(approximate="tanh"), ReturnsBias(fc2)

    def forward(self, x):
        return self.fc2(self.activation_fn(self.fc1(x)[0]))[0]


def module(**children):
    made = nn.Module()
    for name, child in children.items():
        setattr(made, name, child)
    return made


def vllm_tower(lean):
    """A tower with vLLM's names and the weights of the lean model, which computes nothing itself."""

    def layer(source):
        qkv, out = source.self_attn.qkv_proj, source.self_attn.out_proj
        attention = module(qkv_proj=ReturnsBias(lambda x: torch.cat(qkv(x), dim=-1)), out_proj=ReturnsBias(out))
        attention.head_dim = source.self_attn.head_dim
        mlp = MLP(source.mlp.fc1, source.mlp.fc2)
        return module(layer_norm1=source.layer_norm1, layer_norm2=source.layer_norm2, mlp=mlp, self_attn=attention)

    tower = lean.visual
    embed = module(position_embedding=tower.position_embedding)
    embed.patch_embedding = PatchEmbedding(tower)
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
    config = SimpleNamespace(
        lean=lambda: lean.config,
        model_type=lean.config.model_type,
        hidden_size=lean.config.hidden_size,
        vision_config=lean.config.vision_config,
    )
    options = {"quant_config": quant_config, "lora_config": lora_config}
    return SimpleNamespace(config=config, visual=visual, lean=lean, **options)


def class_of(models, model_type):
    return getattr(models, f"{model_type}ForConditionalGeneration")
