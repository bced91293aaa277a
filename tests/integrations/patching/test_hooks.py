"""Patched modules with hooks (accelerate), adapters (peft) and forwards replaced by other code."""

from collections import Counter
from types import MethodType

import pytest
import torch
from torch import nn

import keye_kernels as kk
from keye_kernels.integrations.patching.patch import patched_parts

pytest.importorskip("transformers")
from tests.helpers.patched_families import build, instance_forwards, logits, operators_run

FLOAT32 = {"atol": 1e-5, "rtol": 1e-5}
FAMILY = "qwen2_vl"


@pytest.fixture
def model() -> nn.Module:
    return build(FAMILY)


@pytest.mark.parametrize("hooks_first", [True, False], ids=["hooked-then-patched", "patched-then-hooked"])
def test_accelerate_hooks_run_before_the_replaced_forward(model, hooks_first):
    hooks = pytest.importorskip("accelerate.hooks")
    called = []

    class RecordCalls(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            called.append(module)
            return args, kwargs

    attention = model.model.visual.blocks[0].attn
    expected = logits(model, FAMILY)
    if hooks_first:
        hooks.add_hook_to_module(attention, RecordCalls())
    kk.apply_keye_kernels(model, strict=True)
    if not hooks_first:
        hooks.add_hook_to_module(attention, RecordCalls())
    assert kk.apply_keye_kernels(model).replaced
    torch.testing.assert_close(logits(model, FAMILY), expected, **FLOAT32)
    assert called == [attention] * 2
    assert patched_parts(attention) == {"rope", "attention"}
    kk.revert_keye_kernels(model)
    assert torch.equal(logits(model, FAMILY), expected)
    assert len(called) == 4
    hooks.remove_hook_from_module(attention)
    assert torch.equal(logits(model, FAMILY), expected)


def test_hooks_on_the_layers_of_keyes_own_tower_keep_its_rope():
    """accelerate keeps the replaced forward under another name, where the encoder must find it."""
    hooks, model = pytest.importorskip("accelerate.hooks"), build("keye")
    expected = logits(model, "keye")
    kk.apply_keye_kernels(model, strict=True)
    before = count_operators(model)
    for layer in model.visual.vision_model.encoder.layers:
        hooks.add_hook_to_module(layer.self_attn, hooks.ModelHook())
    assert count_operators(model) == before and before["rope"] == 4
    torch.testing.assert_close(logits(model, "keye"), expected, **FLOAT32)


def count_operators(model: nn.Module) -> Counter:
    with torch.profiler.profile() as profile:
        logits(model, "keye")
    names = [event.name for event in profile.events() if event.name.startswith("keye_kernels::")]
    return Counter(name.removeprefix("keye_kernels::") for name in names)


def test_a_projector_with_offloaded_weights_is_left_alone(model):
    expected = logits(model, FAMILY)
    model = pytest.importorskip("accelerate").cpu_offload(model, execution_device=torch.device("cpu"))
    report = kk.apply_keye_kernels(model)
    assert "hooks" in {item.part: item.note for item in report.left_alone if item.missing}["projector"]
    assert {item.part for item in report.replaced} == {"rope", "attention", "elementwise"}
    torch.testing.assert_close(logits(model, FAMILY), expected, **FLOAT32)


@pytest.mark.parametrize(
    "family, projector, layers",
    [
        ("keye", "mlp_AR", ["linear_1", "linear_2"]),
        ("paddleocr_vl", "model.projector", ["linear_1", "linear_2"]),
        ("qwen2_vl", "model.visual.merger", ["mlp.0", "mlp.2"]),
        ("qwen3_vl", "model.visual.merger", ["linear_fc1", "linear_fc2"]),
    ],
)
def test_lora_added_after_patching_is_applied(family, projector, layers):
    peft = pytest.importorskip("peft")
    names = [f"{projector}.{layer}" for layer in layers]
    config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)

    def adapted(model: nn.Module) -> nn.Module:
        torch.manual_seed(3)
        return peft.inject_adapter_in_model(config, model)

    expected = logits(adapted(build(family)), family)
    model = build(family)
    plain = logits(model, family)
    kk.apply_keye_kernels(model)
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(logits(adapted(model), family), expected, **FLOAT32)


def test_a_hook_added_to_a_projector_after_patching_runs(model):
    kk.apply_keye_kernels(model)
    called = []
    handle = model.model.visual.merger.mlp[0].register_forward_hook(lambda *_: called.append(1))
    expected = logits(model, FAMILY)
    assert called and "patch_merge_projection" not in operators_run(model, FAMILY)
    handle.remove()
    assert "patch_merge_projection" in operators_run(model, FAMILY)
    torch.testing.assert_close(logits(model, FAMILY), expected, **FLOAT32)


def test_a_forward_replaced_by_other_code_is_left_alone(model):
    attention = model.model.visual.blocks[1].attn

    def other_code(self, *args, **kwargs):
        return type(self).forward(self, *args, **kwargs)

    attention.forward = MethodType(other_code, attention)
    expected = logits(model, FAMILY)
    report = kk.apply_keye_kernels(model)
    left = {(item.module, item.part): item.note for item in report.left_alone if item.missing}
    assert "other_code" in left["model.visual.blocks.1.attn", "attention"]
    # One layer needs cos and sin, so the whole tower keeps its rope
    assert {name for name, part in left if part == "rope"} == {
        "model.visual.rotary_pos_emb",
        "model.visual.blocks.0.attn",
        "model.visual.blocks.1.attn",
    }
    torch.testing.assert_close(logits(model, FAMILY), expected, **FLOAT32)
    kk.revert_keye_kernels(model)
    assert instance_forwards(model).keys() == {"model.visual.blocks.1.attn"}
