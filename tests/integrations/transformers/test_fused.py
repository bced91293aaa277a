"""The elementwise work of the layers runs fused, with unchanged results; hooks, adapters and checkpointing are respected."""

import pytest
import torch
import torch.nn.functional as F

import keye_kernels as kk
from keye_kernels import ops
from tests.helpers.tiny import prompt

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
VISION_LAYERS = TEXT_LAYERS = 2


@pytest.fixture
def launched(monkeypatch):
    """The fused operators that were called."""
    names = []
    for name in ("add_norm", "silu_mul"):
        run = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, run=run, name=name, **k: names.append(name) or run(*a, **k))
    return names


def run(model, impl="triton", **options):
    with torch.no_grad(), ops.use_impl(impl):
        return model(**prompt([(1, 4, 6)]), **options)


def test_layers_launch_as_few_kernels_as_those_of_the_lean_model(tiny, launched):
    expected = run(tiny, "auto").logits
    assert not launched, "on a CPU, auto calls the modules"
    torch.testing.assert_close(run(tiny).logits, expected, **CLOSE)
    assert launched == ["add_norm"] * 2 * VISION_LAYERS + ["add_norm", "add_norm", "silu_mul"] * TEXT_LAYERS + ["add_norm"]


def test_hidden_states_that_were_returned_are_not_overwritten(tiny, monkeypatch):
    residuals, real = [], torch.Tensor.addmm_
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda x, *a: residuals.append(x) or real(x, *a))
    expected = run(tiny, "auto", output_hidden_states=True).hidden_states
    found = run(tiny, output_hidden_states=True).hidden_states
    assert len(residuals) == TEXT_LAYERS
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
        "model.layers.0.mlp",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.down_proj",
        "visual.vision_model.encoder.layers.0.layer_norm1",
        "visual.vision_model.encoder.layers.0.layer_norm2",
        "visual.vision_model.encoder.layers.0.mlp",
        "visual.vision_model.encoder.layers.0.mlp.fc1",
    ],
)
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_hooks_are_called_and_keep_their_tensors(tiny, name, impl):
    kept = []
    expected = run(tiny, impl).logits
    tiny.get_submodule(name).register_forward_hook(lambda _, args, out: kept.append((args[0], args[0].clone(), out, out.clone())))
    torch.testing.assert_close(run(tiny, impl).logits, expected, **CLOSE)
    ((x, x_then, out, out_then),) = kept
    assert torch.equal(x, x_then) and torch.equal(out, out_then)


def test_a_forward_hook_of_a_layer_sees_the_hidden_states(tiny):
    kept = []
    for layer in tiny.model.layers:
        layer.register_forward_hook(lambda _, args, out: kept.append((args[0], args[0].clone(), out[0], out[0].clone())))
    run(tiny)
    for x, x_then, out, out_then in kept:
        assert x.ndim == 3 and torch.equal(x, x_then) and torch.equal(out, out_then)


def test_lora_is_applied(tiny):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    names = ["gate_proj", "up_proj", "down_proj", "fc1", "fc2", "q_proj", "out_proj"]
    before = run(tiny).logits
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny, peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    expected = run(model, "auto").logits
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(run(model).logits, expected, **CLOSE)


def test_a_replaced_mlp_is_called(tiny):
    class Experts(torch.nn.Module):
        def forward(self, x):
            return x * 0.5

    tiny.model.layers[1].mlp = Experts()
    torch.testing.assert_close(run(tiny).logits, run(tiny, "auto").logits, **CLOSE)


def test_gradient_checkpointing_computes_the_same_in_both_passes(tiny, launched):
    """Reentrant checkpointing runs each layer without gradients first."""
    tiny.train().gradient_checkpointing_enable({"use_reentrant": True})
    run(tiny)
    assert launched == ["silu_mul"] * TEXT_LAYERS + ["add_norm"], "only what is outside of the layers' own sums"


def test_gradients_are_those_of_the_modules(tiny, launched):
    inputs = prompt([(1, 4, 6)])
    with ops.use_impl("triton"):
        tiny(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert not launched


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_tokens_are_those_of_the_lean_model(tiny, tiny_folder, impl):
    inputs, greedy = prompt([(1, 4, 6)]), {"max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    expected = kk.Keye.from_pretrained(tiny_folder).generate(**inputs, max_new_tokens=4, eos_token_id=())
    with ops.use_impl(impl):
        assert torch.equal(tiny.generate(**inputs, **greedy), expected)


def test_embeddings_of_any_layout(tiny):
    embeds = torch.randn(tiny.config.hidden_size, 5, 1).permute(2, 1, 0)
    with torch.no_grad():
        expected = tiny(inputs_embeds=embeds.contiguous()).logits
        with ops.use_impl("triton"):
            torch.testing.assert_close(tiny(inputs_embeds=embeds).logits, expected, **CLOSE)


def test_a_text_layer_compiles_to_one_graph(tiny):
    torch.compiler.reset()
    inputs = {"inputs_embeds": torch.randn(1, 6, tiny.config.hidden_size), "position_ids": torch.arange(6).expand(3, 1, 6)}
    with torch.no_grad():
        expected = tiny.model(**inputs).last_hidden_state
        compiled = torch.compile(tiny.model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**inputs).last_hidden_state, expected, **CLOSE)


def test_the_gate_of_an_adapter_is_not_overwritten():
    from keye_kernels.integrations.transformers.text import TextMLP

    class Config:
        hidden_size, intermediate_size = 8, 12

    mlp, x = TextMLP(Config()), torch.randn(3, 8)
    kept = torch.randn(3, 12)
    mlp.gate_proj.forward = lambda _: kept
    before = kept.clone()
    with torch.no_grad():
        torch.testing.assert_close(mlp.hidden(x), F.silu(before) * mlp.up_proj(x))
    assert torch.equal(kept, before)
