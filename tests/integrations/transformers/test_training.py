"""Loss, gradients, gradient checkpointing and LoRA."""

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.tiny import prompt


def batch():
    inputs = prompt([(1, 4, 6)])
    labels = inputs["input_ids"].clone()
    labels[labels == 115] = -100
    return inputs, labels


def gradients(model):
    inputs, labels = batch()
    model.zero_grad()
    model(**inputs, labels=labels).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_loss_is_next_token_cross_entropy(tiny):
    inputs, labels = batch()
    output = tiny(**inputs, labels=labels)
    expected = F.cross_entropy(output.logits[0, :-1], labels[0, 1:], ignore_index=-100)
    torch.testing.assert_close(output.loss, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "keye"])
def test_every_parameter_gets_a_gradient(tiny, implementation):
    tiny.set_attn_implementation(implementation)
    found = gradients(tiny)
    without_gradient = [name for name, grad in found.items() if grad is None or not grad.any()]
    # The bias of k adds the same value to all scores of a query, which softmax ignores
    assert all(name.endswith("k_proj.bias") for name in without_gradient), without_gradient


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(tiny, reentrant):
    expected = gradients(tiny.train())
    tiny.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        tiny.enable_input_require_grads()
    layer, calls = tiny.model.layers[0].input_layernorm, []
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    found = gradients(tiny)
    handle.remove()
    assert len(calls) == 2, "the layer must be recomputed in the backward pass"
    for name, gradient in expected.items():
        # Reentrant checkpointing needs an input that requires a gradient; pixels do not
        if reentrant and name.startswith("visual."):
            continue
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)


def test_lora_trains_only_its_adapters(tiny):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    inputs, labels = batch()
    before = tiny(**inputs).logits
    names = ["q_proj", "v_proj", "out_proj", "gate_proj", "fc1", "linear_1", "linear_2", "patch_embedding"]
    model = peft.get_peft_model(tiny, peft.LoraConfig(r=2, target_modules=names, task_type="CAUSAL_LM"))
    torch.testing.assert_close(model(**inputs).logits, before, atol=1e-5, rtol=1e-5)
    old = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    first = model(**inputs, labels=labels).loss
    first.backward()
    optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, old[name])}
    # B starts at zero, so A changes only from the second step
    assert changed == {name for name in old if "lora_B" in name}
    assert {name.split(".lora_B")[0].rpartition(".")[2] for name in changed} == set(names)
    assert model(**inputs, labels=labels).loss < first
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 3
