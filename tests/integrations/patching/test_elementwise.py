"""The replaced layers and MLPs: fused kernels run in plain layers, and everything else runs as in the class."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import keye_kernels as kk
from keye_kernels import ops

pytest.importorskip("transformers")
from keye_kernels.integrations.patching.elementwise import activation_kind, is_known_norm, layer_obstacle, mlp_obstacle
from keye_kernels.model import fused
from keye_kernels.ops import prepared
from tests.helpers.patched_families import BUILDERS, batch, build, instance_forwards, logits

FLOAT32 = {"atol": 2e-5, "rtol": 2e-5}
ONLY = {"rope": False, "attention": False, "projector": False}
# Per forward: two norms in each of two layers, and the gate where the MLP has one. Keye's stand-in has no text MLP.
OPERATORS = {
    "keye": {"add_norm": 4},
    "paddleocr_vl": {"add_norm": 8, "silu_mul": 2},
    "qwen2_vl": {"add_norm": 12, "silu_mul": 2},  # image and clip
    "qwen2_5_vl": {"add_norm": 12, "silu_mul": 6},
    "qwen3_vl": {"add_norm": 12, "silu_mul": 2},
}


@pytest.fixture
def launched(monkeypatch):
    names = []
    for name in ("add_norm", "silu_mul"):
        run = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, run=run, name=name, **k: names.append(name) or run(*a, **k))
    return names


def fused_logits(model: nn.Module, family: str) -> torch.Tensor:
    """Runs add_norm and silu_mul in Triton's interpreter; the other operators keep their reference."""
    with ops.use_impl("triton"):
        return logits(model, family)


@pytest.mark.parametrize("family", BUILDERS)
def test_fused_kernels_run_and_outputs_match(family, launched):
    model = build(family)
    expected = logits(model, family)
    kk.apply_keye_kernels(model, **ONLY)
    assert torch.equal(logits(model, family), expected), "on a CPU, auto calls the modules"
    assert not launched
    torch.testing.assert_close(fused_logits(model, family), expected, **FLOAT32)
    assert {name: launched.count(name) for name in dict.fromkeys(launched)} == OPERATORS[family]
    kk.revert_keye_kernels(model)
    assert not instance_forwards(model) and torch.equal(fused_logits(model, family), expected)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_training_computes_what_the_class_computes(family, launched):
    model = build(family).train()
    kk.apply_keye_kernels(model, **ONLY)
    with ops.use_impl("triton"):
        model(**batch(family)).logits.square().mean().backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert not launched
    kk.revert_keye_kernels(model)
    model.zero_grad()
    model(**batch(family)).logits.square().mean().backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_still_recomputes_the_layers(reentrant):
    model = build("qwen2_vl").train()
    kk.apply_keye_kernels(model, **ONLY)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls = []
    model.model.visual.blocks[1].norm1.register_forward_hook(lambda *_: calls.append("vision"))
    model.model.language_model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append("text"))
    model(**batch("qwen2_vl")).logits.square().mean().backward()
    # The tower runs for the image and the clip. Reentrant checkpointing needs an input that requires a gradient, which depends on
    # the version of transformers in the tower
    assert calls.count("text") == 2 and (reentrant or calls.count("vision") == 4), "recomputed in the backward pass"


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen2_vl", "model.visual.blocks.0.norm2"),
        ("qwen2_vl", "model.visual.blocks.0.mlp.fc1"),
        ("qwen2_vl", "model.visual.blocks.0.mlp.act"),
        ("qwen2_5_vl", "model.visual.blocks.0.mlp.gate_proj"),
        ("qwen2_5_vl", "model.visual.blocks.0.norm1"),
        ("qwen3_vl", "model.visual.blocks.0.mlp.linear_fc1"),
        ("qwen3_vl", "model.visual.blocks.0.mlp.act_fn"),
        ("paddleocr_vl", "model.language_model.layers.0.mlp.act_fn"),
        ("keye", "visual.vision_model.encoder.layers.0.layer_norm2"),
    ],
)
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_hooks_are_called_and_keep_their_tensors(family, name, impl):
    model, kept = build(family), []
    expected = logits(model, family)
    kk.apply_keye_kernels(model, **ONLY)
    model.get_submodule(name).register_forward_hook(
        lambda _, args, out: kept.append((args[0], args[0].clone(), out, out.clone()))
    )
    run = fused_logits if impl == "triton" else logits
    torch.testing.assert_close(run(model, family), expected, **FLOAT32)
    assert kept
    for x, x_then, out, out_then in kept:
        assert torch.equal(x, x_then) and torch.equal(out, out_then)


@pytest.mark.parametrize(("family", "layers"), [("qwen2_vl", ["fc1", "fc2"]), ("qwen2_5_vl", ["gate_proj", "down_proj"])])
def test_lora_added_after_patching_is_applied(family, layers):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False)

    def adapted(model: nn.Module) -> nn.Module:
        torch.manual_seed(3)
        return peft.inject_adapter_in_model(config, model)

    expected = logits(adapted(build(family)), family)
    model = build(family)
    plain = logits(model, family)
    kk.apply_keye_kernels(model, **ONLY)
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(fused_logits(adapted(model), family), expected, **FLOAT32)


def test_an_activation_that_is_replaced_after_patching_is_used():
    for family, name in (("qwen2_vl", "act"), ("qwen2_5_vl", "act_fn"), ("qwen3_vl", "act_fn")):
        model = build(family)
        kk.apply_keye_kernels(model, **ONLY)
        setattr(model.model.visual.blocks[0].mlp, name, nn.ReLU())
        found = fused_logits(model, family)
        kk.revert_keye_kernels(model)
        torch.testing.assert_close(found, logits(model, family), **FLOAT32)


def test_hidden_states_that_were_returned_are_not_overwritten():
    model = build("qwen2_5_vl")
    expected = logits_and_states(model)
    kk.apply_keye_kernels(model, **ONLY)
    with ops.use_impl("triton"):
        torch.testing.assert_close(logits_and_states(model), expected, **FLOAT32)


def logits_and_states(model: nn.Module) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return model(**batch("qwen2_5_vl"), output_hidden_states=True).hidden_states


def test_quick_gelu_is_silu_with_its_factors_in_the_matmuls():
    fc1, fc2, x = nn.Linear(16, 24), nn.Linear(24, 16), torch.randn(5, 16)
    with torch.no_grad(), ops.use_impl("triton"):
        hidden = fc1(x)
        torch.testing.assert_close(fused.quick_gelu_mlp(x, fc1, fc2), fc2(hidden * torch.sigmoid(1.702 * hidden)), **FLOAT32)
        assert fused.quick_gelu_mlp(x, nn.Linear(16, 24, bias=False), fc2) is None
        assert fused.quick_gelu_mlp(x, fc1, nn.Linear(24, 16, bias=False)) is None
    assert fused.quick_gelu_mlp(x, fc1, fc2) is None, "gradients"


def test_activations_are_recognized_by_what_they_compute():
    assert activation_kind(nn.SiLU()) == "SiLU" and activation_kind(nn.ReLU()) is None and activation_kind(nn.GELU()) is None
    assert activation_kind(nn.GELU(approximate="tanh")) == "GELU in its tanh form"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ScaledBlock(Block):
    def forward(self, x):
        x = x + 0.5 * self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GatedBlock(Block):
    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(F.relu(x)))


NAMES = ("norm1", "attn", "norm2", "mlp")


def test_layers_with_another_forward_are_left_alone():
    assert layer_obstacle(NAMES, Block(), "elementwise") is None
    for block in (ScaledBlock(), GatedBlock()):
        assert "the forward of its class is not norm" in layer_obstacle(NAMES, block, "elementwise")
    block = Block()
    block.norm2 = nn.BatchNorm1d(8)
    assert "norm2 is a BatchNorm1d" in layer_obstacle(NAMES, block, "elementwise")
    del block.norm2
    assert layer_obstacle(NAMES, block, "elementwise") == "it has no norm2 in this version"


def test_mlps_with_another_activation_are_left_alone():
    model = build("qwen3_vl")
    mlp, names = model.model.visual.blocks[0].mlp, ("linear_fc1", "linear_fc2")
    assert mlp_obstacle(names, "act_fn", mlp, "elementwise") is None
    for activation in (nn.GELU(), nn.SiLU()):
        mlp.act_fn = activation
        assert "is not GELU in its tanh form or QuickGELU" in mlp_obstacle(names, "act_fn", mlp, "elementwise")
    assert kk.apply_keye_kernels(model).replaced
    assert instance_forwards(model).keys() & {"model.visual.blocks.0.mlp", "model.visual.blocks.1.mlp"} == {
        "model.visual.blocks.1.mlp"
    }


def test_only_rms_norms_with_the_known_source_are_registered():
    class OtherRMSNorm(nn.Module):
        variance_epsilon = 1e-6

        def forward(self, x):
            return x * (1 + self.weight)

    assert not is_known_norm(OtherRMSNorm()) and OtherRMSNorm not in fused.FUSED_TYPES
    assert is_known_norm(build("qwen2_5_vl").model.visual.blocks[0].norm1)


def test_layers_repeat_prepared_calls(monkeypatch):
    """From the second layer on, the tower's operators run without their checks."""
    monkeypatch.setattr(prepared, "DEVICE_TYPES", ("cpu",))
    model = build("qwen2_vl")
    kk.apply_keye_kernels(model, projector=False)
    grid = torch.tensor([[1, 4, 4]])
    pixels = torch.randn(16, 96)
    keys = []
    layer = model.model.visual.blocks[1]
    layer.register_forward_pre_hook(lambda *_: keys.append(len(prepared.PREPARED)))
    layer.register_forward_hook(lambda *_: keys.append(len(prepared.PREPARED)))
    prepared.PREPARED.clear()
    with torch.no_grad(), ops.use_impl("triton"):
        model.model.visual(pixels, grid_thw=grid)
    prepared.PREPARED.clear()
    assert keys == [4, 4], "two norms, rope and attention of the first layer are all that is prepared"


def test_a_patched_layer_compiles_to_one_graph():
    model = build("qwen2_vl")
    layer, x = model.model.visual.blocks[0], torch.randn(16, 144)
    kk.apply_keye_kernels(model)
    torch.compiler.reset()
    positions = torch.zeros(16, 2, dtype=torch.int64), torch.rand(1, 18).expand(16, -1)
    options = {"cu_seqlens": torch.tensor([0, 16], dtype=torch.int32), "position_embeddings": positions}
    with torch.no_grad():
        expected = layer(x, **options)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x, **options), expected, **FLOAT32)
