"""Each supported family: outputs, operators that run, report, strict mode, revert, gradients and generation."""

import re
from collections import Counter
from types import ModuleType

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import keye_kernels as kk

pytest.importorskip("transformers")
from tests.helpers.patched_families import BUILDERS, batch, build, instance_forwards, logits

# Sums in a different order
FLOAT32 = {"atol": 1e-5, "rtol": 1e-5}
# Two layers per tower; one rope call rotates q and k
OPERATORS = {
    "keye": {"rope": 4, "varlen_attention": 2, "patch_merge_projection": 1},
    "paddleocr_vl": {"rope": 4, "varlen_attention": 2, "patch_merge_projection": 1},
    "qwen2_vl": {"rope": 6, "varlen_attention": 4, "patch_merge_projection": 2},
    "qwen2_5_vl": {"rope": 6, "varlen_attention": 4},
    "qwen3_vl": {"rope": 4, "varlen_attention": 4, "patch_merge_projection": 4},
}
PARTS = ("rope", "attention", "projector", "elementwise")
FAMILIES = pytest.mark.parametrize("family", BUILDERS)


class CountOperators(TorchDispatchMode):
    """Counts calls of this package's operators."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "keye_kernels":
            self.calls[function._opname] += 1
        return function(*args, **(kwargs or {}))


@FAMILIES
def test_outputs_match_and_the_operators_run(family):
    model = build(family)
    expected = logits(model, family)
    keys = list(model.state_dict())
    kk.apply_keye_kernels(model)
    with CountOperators() as counter:
        found = logits(model, family)
    torch.testing.assert_close(found, expected, **FLOAT32)
    assert counter.calls == OPERATORS[family]
    assert list(model.state_dict()) == keys


@FAMILIES
@pytest.mark.parametrize("part", PARTS)
def test_outputs_match_with_one_part_replaced(family, part):
    model = build(family)
    expected = logits(model, family)
    flags = {name: name == part for name in PARTS}
    report = kk.apply_keye_kernels(model, **flags)
    assert {item.part for item in report.replaced} <= {part}
    with CountOperators() as counter:
        torch.testing.assert_close(logits(model, family), expected, **FLOAT32)
    operator = {"rope": "rope", "attention": "varlen_attention", "projector": "patch_merge_projection"}.get(part, "")
    expected_calls = OPERATORS[family].get(operator, 0)
    if (family, part) == ("keye", "rope"):
        expected_calls = 2  # rope_2d of its tower runs inside the replaced attention
        assert any("attention=True" in item.note for item in report.left_alone)
    assert counter.calls == Counter({operator: expected_calls} if expected_calls else {})


@FAMILIES
def test_report_names_every_attention_rope_and_projector_module(family):
    model = build(family)
    report = kk.apply_keye_kernels(model)
    named = {(item.module, item.class_name) for item in (*report.replaced, *report.left_alone)}
    expected_names = {
        (name, type(module).__name__)
        for name, module in model.named_modules()
        if re.search("Attention|Rotary|Merger|Projector", type(module).__name__)
    }
    assert expected_names - {("visual.vision_model.head.attention", "MultiheadAttention")} <= named
    assert all(item.note for item in report.left_alone)
    parts = [(item.module, item.part) for item in (*report.replaced, *report.left_alone)]
    assert len(parts) == len(set(parts))


@FAMILIES
def test_revert_restores_the_model_exactly(family):
    model = build(family)
    expected = logits(model, family)
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    kk.apply_keye_kernels(model)
    assert instance_forwards(model)
    kk.revert_keye_kernels(model)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before
    assert torch.equal(logits(model, family), expected)


@pytest.mark.parametrize("family", ["keye", "qwen2_5_vl"])
def test_bfloat16_error_is_at_most_twice_that_of_the_model(family):
    model = build(family)
    exact = logits(model, family)
    model.bfloat16()
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch(family).items()}
    with torch.no_grad():
        original = model(**inputs).logits
        kk.apply_keye_kernels(model)
        found = model(**inputs).logits
    # Both round in many places, so their errors differ by chance
    error, original_error = ((x.float() - exact).abs().max().item() for x in (found, original))
    assert error <= 2 * original_error


@pytest.mark.parametrize(
    "family, flag, message",
    [
        ("qwen2_5_vl", "projector", "Qwen2_5_VLRMSNorm"),
        ("qwen3_vl", "rope", "interleaves"),
    ],
)
def test_strict_raises_and_changes_nothing(family, flag, message):
    model = build(family)
    with pytest.raises(ValueError, match=message):
        kk.apply_keye_kernels(model, strict=True)
    assert not instance_forwards(model)
    kk.apply_keye_kernels(model, strict=True, **{flag: False})
    assert instance_forwards(model)


@pytest.mark.parametrize("family", ["keye", "paddleocr_vl", "qwen2_vl"])
def test_strict_accepts_a_fully_supported_model(family):
    assert kk.apply_keye_kernels(build(family), strict=True).replaced


def test_gradients_match():
    model = build("qwen2_vl").train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**batch("qwen2_vl")).logits.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    kk.apply_keye_kernels(model)
    found = gradients()
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=lambda text, name=name: f"{name}: {text}", **FLOAT32)


@pytest.mark.parametrize("family", ["qwen2_vl", "paddleocr_vl"])
def test_generation_with_a_cache_produces_the_same_tokens(family):
    model = build(family)
    expected = model.generate(**batch(family), max_new_tokens=6, do_sample=False)
    kk.apply_keye_kernels(model)
    assert torch.equal(model.generate(**batch(family), max_new_tokens=6, do_sample=False), expected)


def test_triton_kernels_run_in_a_patched_model(monkeypatch):
    from keye_kernels.triton import patch_merge, rope, varlen_attention

    launched = []

    def record_launches(module: ModuleType, name: str) -> None:
        launcher = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *arguments: launched.append(name) or launcher(*arguments))

    record_launches(rope, "rope")
    record_launches(varlen_attention, "varlen_attention")
    record_launches(patch_merge, "patch_merge_projection")
    # One head and one layer, because the interpreter is slow
    vision = {"hidden_size": 72, "num_attention_heads": 1, "num_hidden_layers": 1}
    model = build("paddleocr_vl", vision=vision, text={"num_hidden_layers": 1})
    expected = logits(model, "paddleocr_vl")
    kk.apply_keye_kernels(model, strict=True)
    with kk.use_impl("triton"):
        torch.testing.assert_close(logits(model, "paddleocr_vl"), expected, **FLOAT32)
    assert launched == ["rope", "varlen_attention", "patch_merge_projection", "rope"]
