"""The layers of the plugin with stubs in place of vLLM's layers. Runs without vLLM."""

import pytest
import torch
from torch import nn

from tests.helpers.tiny import tiny_model

from .stubs import MLP, ColumnParallelLinear, UnquantizedLinearMethod, vllm_tower

GRIDS = [(1, 4, 6), (2, 4, 4), (1, 2, 2)]
PATCHES = sum(t * h * w for t, h, w in GRIDS)


def test_layers_run_the_fused_functions(models, monkeypatch):
    lean, called = tiny_model(), []
    layer = models.VisionLayer(vllm_tower(lean).encoder.layers[0])

    def recorded(name, run):
        monkeypatch.setattr(models.fused, name, lambda *args: called.append((name, args[-1])) or run(*args))

    recorded("norm", models.fused.norm)
    recorded("add_norm", models.fused.add_norm)
    batch, x = lean.visual.geometry(torch.tensor(GRIDS), PATCHES), torch.randn(PATCHES, 48)
    monkeypatch.setattr(models.fused, "has_gelu_epilogue", lambda x, weight: weight is layer.mlp.fc1.weight)
    monkeypatch.setattr(models.fused, "matmul_gelu", lambda *args: called.append("matmul_gelu") or gelu(*args))
    with torch.no_grad():
        found = layer(x, batch, torch.full((6,), 0.5))
        assert called == [("norm", layer.layer_norm1), ("add_norm", layer.layer_norm2), "matmul_gelu"]
        expected = lean.visual.layers[0](x, batch, torch.full((6,), 0.5))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def gelu(x, weight, bias):
    return nn.functional.gelu(nn.functional.linear(x, weight, bias), approximate="tanh")


def plain_mlp():
    return MLP(nn.Linear(16, 32), nn.Linear(32, 16))


def other_layers():
    """MLPs of vLLM that must be called."""

    class WithLoRA(ColumnParallelLinear):
        pass

    class Quantized(UnquantizedLinearMethod):
        pass

    lora, quantized, flashinfer, no_bias, gathered, added_later, erf, hook = (plain_mlp() for _ in range(8))
    lora.fc1, no_bias.fc1 = WithLoRA(16, 32), ColumnParallelLinear(16, 32, bias=False)
    quantized.fc1.quant_method = Quantized()
    flashinfer.fc1.quant_method._gemm_impl = print
    gathered.fc1.gather_output = added_later.fc1.skip_bias_add = True
    erf.activation_fn = nn.GELU()
    hook.fc1.register_forward_hook(lambda *args: None)
    names = ["lora", "quantized", "flashinfer", "no bias", "gathered", "bias added later", "erf", "hook"]
    return dict(zip(names, [lora, quantized, flashinfer, no_bias, gathered, added_later, erf, hook], strict=True))


@pytest.mark.parametrize("name", [*other_layers(), "batch invariant"])
def test_other_mlps_are_called(models, monkeypatch, name):
    monkeypatch.setattr(models.envs, "VLLM_BATCH_INVARIANT", name == "batch invariant")
    assert not models._is_matmul_and_tanh_gelu(other_layers().get(name) or plain_mlp())
