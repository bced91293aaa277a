"""The elementwise work of a layer: fused kernels where Triton runs and nothing else is needed, the modules everywhere else."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from keye_kernels import ops
from keye_kernels.model import fused
from keye_kernels.model.linear import Linear
from tests.helpers.tiny import prompt, tiny_model

FP32 = {"atol": 2e-6, "rtol": 2e-6}


@pytest.fixture
def launched(monkeypatch):
    """The fused operators that were called."""
    names = []
    for name in ("add_norm", "silu_mul"):
        run = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, run=run, name=name, **k: names.append(name) or run(*a, **k))
    return names


def norms():
    torch.manual_seed(0)
    made = nn.LayerNorm(32, eps=1e-5), nn.RMSNorm(32, eps=1e-3)
    for module in made:
        for parameter in module.parameters():
            nn.init.normal_(parameter)
    return made


X, RESIDUAL = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).unbind(0)


@pytest.mark.parametrize("module", norms(), ids=["LayerNorm", "RMSNorm"])
def test_norms_equal_the_module(module, launched):
    with torch.no_grad():
        torch.testing.assert_close(fused.norm(X, module, "triton"), module(X), **FP32)
        total, normed = fused.add_norm(X, RESIDUAL, module, "triton")
        assert torch.equal(total, RESIDUAL + X)
        torch.testing.assert_close(normed, module(total), **FP32)
        assert launched == ["add_norm"] * 2
        assert torch.equal(fused.norm(X, module), module(X)) and torch.equal(
            fused.add_norm(X, RESIDUAL, module)[1], module(total)
        )
    assert launched == ["add_norm"] * 2, "on a CPU, auto calls the module"


def test_silu_mul_and_its_memory(launched):
    gate, up = X.clone(), RESIDUAL.clone()
    with torch.no_grad():
        torch.testing.assert_close(fused.silu_mul(gate, up, "triton"), F.silu(X) * RESIDUAL, **FP32)
        assert launched == ["silu_mul"] and torch.equal(gate, X)
        assert fused.silu_mul(gate, up).data_ptr() == gate.data_ptr()
    assert torch.equal(gate, F.silu(X) * RESIDUAL)
    gate = X.clone().requires_grad_()
    assert fused.silu_mul(gate, up).data_ptr() != gate.data_ptr()


def test_a_linear_layer_adds_to_the_residual():
    layer, biased, residual = Linear(32, 32, bias=False), Linear(32, 32), RESIDUAL.clone()
    with torch.no_grad():
        expected = RESIDUAL + layer(X)
        found = fused.add_linear(X, residual, layer, "triton")
        torch.testing.assert_close(found, expected, **FP32)
        assert found.data_ptr() == residual.data_ptr()
        for module, impl in ((layer, "auto"), (biased, "triton")):
            kept = RESIDUAL.clone()
            torch.testing.assert_close(fused.add_linear(X, kept, module, impl), RESIDUAL + module(X), **FP32)
            assert torch.equal(kept, RESIDUAL)


def test_gelu_is_the_tanh_form(monkeypatch):
    layer = nn.Linear(32, 32)
    with torch.no_grad():
        for impl in ("auto", "triton"):
            assert torch.equal(fused.linear_gelu(X, layer, impl), F.gelu(layer(X), approximate="tanh"))


@pytest.mark.parametrize("form", ["tanh", "none"])
def test_the_epilogue_is_used_only_where_it_is_the_tanh_form(form, monkeypatch):
    monkeypatch.setattr(
        torch, "_addmm_activation", lambda bias, x, weight, use_gelu: F.gelu(torch.addmm(bias, x, weight), approximate=form)
    )
    fused._epilogue_is_tanh.cache_clear()
    assert fused._epilogue_is_tanh(torch.device("cpu")) == (form == "tanh")
    fused._epilogue_is_tanh.cache_clear()


def test_an_rms_norm_in_float32_returns_float32():
    """As the RMSNorm classes of transformers: weight * x.to(dtype of the input)."""

    class Norm(nn.RMSNorm):
        def forward(self, x):
            return self.weight * F.rms_norm(x.float(), self.normalized_shape, eps=self.eps).to(x.dtype)

    module = Norm(32, eps=1e-6)
    fused.FUSED_TYPES.add(Norm)
    with torch.no_grad():
        assert fused.norm(X.half(), module, "triton").dtype == torch.float32
        assert fused.norm(X.half(), module.half(), "triton").dtype == torch.float16
    fused.FUSED_TYPES.remove(Norm)


def test_several_leading_axes():
    x, residual, other = (torch.randn(2, 3, 32) for _ in range(3))
    norm, layer, fc1 = norms()[1], nn.Linear(32, 16, bias=False), nn.Linear(32, 48)
    with torch.no_grad():
        total = residual + x
        torch.testing.assert_close(fused.norm(x, norm, "triton"), norm(x), **FP32)
        torch.testing.assert_close(fused.add_norm(x, residual, norm, "triton"), (total, norm(total)), **FP32)
        torch.testing.assert_close(fused.silu_mul(x, other, "triton"), F.silu(x) * other, **FP32)
        torch.testing.assert_close(fused.linear_gelu(x, fc1, "triton"), F.gelu(fc1(x), approximate="tanh"), **FP32)
        for narrow in (total[..., :16].contiguous(), total[..., :16]):
            expected = narrow + layer(x)
            torch.testing.assert_close(fused.add_linear(x, narrow, layer, "triton"), expected, **FP32)


def test_an_output_that_a_hook_keeps_is_not_overwritten():
    layer, kept = nn.Linear(32, 32), []
    layer.register_forward_hook(lambda module, args, out: kept.append(out))
    with torch.no_grad():
        fused.linear_gelu(X, layer)
        assert torch.equal(kept[0], F.linear(X, layer.weight, layer.bias))


@pytest.mark.parametrize(
    "condition", ["gradients", "autocast", "hook", "subclass", "weight", "no weight", "float64", "reference"]
)
def test_otherwise_the_module_is_called(condition, launched):
    module, x, impl = norms()[0], X, "triton"
    if condition == "hook":
        module.register_forward_hook(lambda *_: None)
    if condition == "subclass":
        module = type("Norm", (nn.LayerNorm,), {})(32)
    if condition == "weight":
        module.weight = nn.Parameter(module.weight.detach().as_subclass(type("Weight", (torch.Tensor,), {})))
    if condition == "no weight":
        module = nn.LayerNorm(32, elementwise_affine=False)
    if condition == "float64":
        module, x = module.double(), X.double()
    if condition == "reference":
        impl = "reference"
    with torch.set_grad_enabled(condition == "gradients"), torch.autocast("cpu", enabled=condition == "autocast"):
        found, expected = fused.add_norm(x, x, module, impl)[1], module(x + x)
        assert torch.equal(found, expected) and torch.equal(fused.norm(x, module, impl), module(x))
    assert not launched


def test_a_layer_launches_few_kernels(launched):
    """Of a layer's elementwise work: two norms in the tower; two norms and the gate in the decoder."""
    model, inputs = tiny_model(), prompt([(1, 4, 6)])
    with torch.no_grad(), ops.use_impl("triton"):
        found = model(**inputs).logits
    assert launched == ["add_norm"] * 2 * len(model.visual.layers) + ["add_norm", "add_norm", "silu_mul"] * len(
        model.model.layers
    )
    with torch.no_grad():
        torch.testing.assert_close(found, model(**inputs).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["mlp", "post_attention_layernorm"])
def test_hooks_in_a_decoder_layer_are_called_and_keep_their_inputs(name):
    model, inputs = tiny_model(), prompt([(1, 4, 6)])
    kept = []
    layer = model.model.layers[0]
    getattr(layer, name).register_forward_hook(
        lambda module, args, out: kept.append((args[0], args[0].clone(), out, out.clone()))
    )
    with torch.no_grad(), ops.use_impl("triton"):
        model(**inputs)
    ((x, x_then, out, out_then),) = kept
    assert torch.equal(x, x_then) and torch.equal(out, out_then)
