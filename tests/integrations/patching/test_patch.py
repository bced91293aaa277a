"""apply_keye_kernels and revert_keye_kernels: repeated calls, copies, saving, devices, torch.compile, reports and errors."""

import copy
import io

import pytest
import torch
from torch import nn

import keye_kernels as kk
from keye_kernels.integrations.patching.patch import patched_parts
from tests.helpers.tiny import CONFIG, tiny_model

pytest.importorskip("transformers")
from tests.helpers.patched_families import BUILDERS, build, instance_forwards, logits, operators_run

FLOAT32 = {"atol": 1e-5, "rtol": 1e-5}
FAMILY = "qwen2_vl"


@pytest.fixture
def model() -> nn.Module:
    return build(FAMILY)


def test_a_second_call_changes_nothing(model):
    first = kk.apply_keye_kernels(model)
    before = instance_forwards(model)
    second = kk.apply_keye_kernels(model, strict=True)
    assert instance_forwards(model) == before
    assert (second.replaced, second.left_alone) == (first.replaced, first.left_alone)


def test_calls_with_different_flags_add_up(model):
    together = build(FAMILY)
    kk.apply_keye_kernels(together)
    flags = ("attention", "elementwise", "projector", "rope")
    for flag in flags:
        kk.apply_keye_kernels(model, **{f: f == flag for f in flags})
    assert {name: f.__func__ for name, f in instance_forwards(model).items()} == {
        name: f.__func__ for name, f in instance_forwards(together).items()
    }


def test_the_report_names_what_earlier_calls_replaced(model):
    everything = kk.apply_keye_kernels(build(FAMILY))
    kk.apply_keye_kernels(model, rope=False, projector=False)
    second = kk.apply_keye_kernels(model, rope=False, attention=False)
    assert set(second.replaced) == {item for item in everything.replaced if item.part != "rope"}
    assert {item.part for item in second.left_alone if "not requested" in item.note} == {"rope"}


def test_parts_that_were_not_requested_are_reported(model):
    report = kk.apply_keye_kernels(model, projector=False, strict=True)
    notes = {item.module: item.note for item in report.left_alone}
    assert notes["model.visual.merger"] == "not requested (projector=False)"


def test_other_instances_and_the_class_do_not_change(model):
    other, class_forward = build(FAMILY), type(model.model.visual.blocks[0].attn).forward
    kk.apply_keye_kernels(model)
    assert not instance_forwards(other)
    assert type(model.model.visual.blocks[0].attn).forward is class_forward


def test_context_manager_reverts_its_changes(model):
    with kk.apply_keye_kernels(model) as report:
        assert instance_forwards(model) and report.replaced
    assert not instance_forwards(model)


def test_context_manager_reverts_after_an_exception(model):
    with pytest.raises(KeyError), kk.apply_keye_kernels(model):
        raise KeyError
    assert not instance_forwards(model)


def test_context_manager_keeps_earlier_patches(model):
    kk.apply_keye_kernels(model, attention=False, projector=False)
    before = instance_forwards(model)
    with kk.apply_keye_kernels(model):
        assert instance_forwards(model) != before
    assert instance_forwards(model) == before


def test_a_report_reverts_only_once(model):
    with kk.apply_keye_kernels(model) as report:
        pass
    kk.apply_keye_kernels(model)
    before = instance_forwards(model)
    with report:
        pass
    assert instance_forwards(model) == before


@pytest.mark.parametrize("part", ["blocks.0", "blocks.0.attn", "rotary_pos_emb"])
def test_reverting_one_module_of_several_that_share_positions_raises(model, part):
    expected = logits(model, FAMILY)
    kk.apply_keye_kernels(model)
    before = instance_forwards(model)
    with pytest.raises(ValueError, match="exchanges positions with modules outside of it"):
        kk.revert_keye_kernels(model.model.visual.get_submodule(part))
    assert instance_forwards(model) == before
    kk.revert_keye_kernels(model.model.visual)
    torch.testing.assert_close(logits(model, FAMILY), expected, **FLOAT32)
    assert instance_forwards(model).keys() and not instance_forwards(model.model.visual)


def test_a_submodule_without_replaced_rope_can_be_reverted_alone(model):
    kk.apply_keye_kernels(model, rope=False)
    kk.revert_keye_kernels(model.model.visual.blocks[0])
    in_layer = ("", ".attn", ".mlp")
    text = {f"model.language_model.layers.{i}{name}" for i in range(2) for name in ("", ".mlp")}
    vision = {f"model.visual.blocks.1{name}" for name in in_layer} | {"model.visual.merger"}
    assert instance_forwards(model).keys() == vision | text


def test_a_deepcopy_is_patched_and_independent(model):
    expected = logits(model, FAMILY)
    kk.apply_keye_kernels(model)
    copied = copy.deepcopy(model)
    assert instance_forwards(copied).keys() == instance_forwards(model).keys()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(logits(copied, FAMILY), expected, **FLOAT32)
    kk.revert_keye_kernels(copied)
    assert instance_forwards(model) and not instance_forwards(copied)


@pytest.mark.parametrize("family", BUILDERS)
def test_a_saved_model_loads_unpatched(family):
    model = build(family)
    expected = logits(model, family)
    report, file = kk.apply_keye_kernels(model), io.BytesIO()
    torch.save(model, file)
    assert b"keye_kernels" not in file.getvalue()
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert not any(patched_parts(module) for module in loaded.modules())
    assert torch.equal(logits(loaded, family), expected)
    assert kk.apply_keye_kernels(loaded).replaced == report.replaced
    torch.testing.assert_close(logits(loaded, family), expected, **FLOAT32)


def test_changes_of_dtype_and_device_keep_the_patch(model):
    expected = logits(model, FAMILY)
    kk.apply_keye_kernels(model)
    model.to(torch.float64)
    model.to(torch.float32).to("cpu")
    assert instance_forwards(model)
    torch.testing.assert_close(logits(model, FAMILY), expected, **FLOAT32)


@pytest.mark.parametrize("patch_first", [True, False], ids=["patched-then-compiled", "compiled-then-patched"])
def test_compiled_modules_follow_apply_and_revert(model, patch_first):
    expected = logits(model, FAMILY)
    torch.compiler.reset()
    compiled = model.model.visual.merger, model.model.language_model.layers[0].self_attn
    if patch_first:
        kk.apply_keye_kernels(model, attention=False)
    for module in compiled:
        module.compile(backend="eager")
    torch.testing.assert_close(logits(model, FAMILY), expected, **FLOAT32)
    if not patch_first:
        kk.apply_keye_kernels(model, attention=False)
    torch.testing.assert_close(logits(model, FAMILY), expected, **FLOAT32)
    assert operators_run(model, FAMILY) == {"rope", "patch_merge_projection"}
    kk.revert_keye_kernels(model)
    torch.testing.assert_close(logits(model, FAMILY), expected, **FLOAT32)
    assert not operators_run(model, FAMILY)


def test_a_compiled_model_can_be_patched(model):
    compiled = torch.compile(model, backend="eager")
    assert kk.apply_keye_kernels(compiled, strict=True).replaced
    assert instance_forwards(model)
    kk.revert_keye_kernels(compiled)
    assert not instance_forwards(model)


def test_patched_layers_compile_into_one_graph(model):
    """The original vision attention does not: it reads the length of every image."""
    kk.apply_keye_kernels(model)
    tower, text = model.model.visual, model.model.language_model
    position_ids, cu_seqlens = torch.randint(0, 5, (24, 2)), torch.tensor([0, 8, 24], dtype=torch.int32)
    positions = torch.arange(5).expand(3, 2, 5)

    def run(patches: torch.Tensor, embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pair = tower.rotary_pos_emb(patches, position_ids)
        patches = tower.blocks[0](patches, cu_seqlens=cu_seqlens, position_embeddings=pair)
        return tower.merger(patches), text.layers[0](embeds, position_embeddings=text.rotary_emb(embeds, positions))

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for inputs in ((torch.randn(24, 144), torch.randn(2, 5, 64)) for _ in range(2)):
            torch.testing.assert_close(compiled(*inputs), run(*inputs), **FLOAT32)


def test_an_unknown_attention_class_keeps_the_rope_of_its_tower(model):
    class UnknownAttention(type(model.model.visual.blocks[0].attn)):
        pass

    model.model.visual.blocks[0].attn.__class__ = UnknownAttention
    expected = logits(model, FAMILY)
    report = kk.apply_keye_kernels(model)
    notes = {(item.module, item.part): item.note for item in report.left_alone if item.missing}
    assert notes["model.visual.blocks.0.attn", "attention"] == "its class is unknown"
    assert "model.visual.blocks.0.attn" in notes["model.visual.rotary_pos_emb", "rope"]
    torch.testing.assert_close(logits(model, FAMILY), expected, **FLOAT32)


@pytest.mark.parametrize(
    "name, attribute, value, message",
    [
        ("model.visual.blocks.0.attn", "attention_dropout", 0.1, "no dropout"),
        ("model.visual.blocks.0.attn", "head_dim", 36, "head dim 36"),
        ("model.visual.rotary_pos_emb", "attention_scaling", 1.5, "scales cos and sin by 1.5"),
        ("model.language_model.rotary_emb", "rope_type", "dynamic", "'dynamic'"),
        ("model.visual.merger.mlp", "1", nn.GELU(approximate="tanh"), "not the exact GELU"),
        ("model.visual.merger.mlp", "0", nn.Bilinear(576, 576, 576), "mlp.0 is a Bilinear"),
    ],
)
def test_unsupported_modules_are_left_alone_with_the_reason(model, name, attribute, value, message):
    setattr(model.get_submodule(name), attribute, value)
    report = kk.apply_keye_kernels(model)
    assert any(message in item.note for item in report.left_alone if item.missing)
    with pytest.raises(ValueError, match=message):
        kk.apply_keye_kernels(model, strict=True)


def transformers_model() -> nn.Module:
    from keye_kernels.integrations.transformers.config import KeyeConfig
    from keye_kernels.integrations.transformers.modeling import KeyeForConditionalGeneration

    return KeyeForConditionalGeneration(KeyeConfig(**CONFIG))


@pytest.mark.parametrize("build_model", [tiny_model, transformers_model])
def test_models_of_this_package_are_reported_and_left_alone(build_model):
    model = build_model()
    report = kk.apply_keye_kernels(model, strict=True)
    assert not report.replaced and not instance_forwards(model)
    assert {item.part for item in report.left_alone} == {"attention", "projector"}
    assert {item.note for item in report.left_alone} == {"part of keye_kernels, already runs kk.ops"}
    assert kk.apply_keye_kernels(model, attention=False).left_alone == report.left_alone


def test_a_model_without_known_modules():
    model = nn.Sequential(nn.Linear(2, 2))
    report = kk.apply_keye_kernels(model)
    assert not report.replaced and not report.left_alone
    assert str(report) == "Sequential: nothing replaced, 0 left alone"
    with pytest.raises(ValueError, match="nothing in Sequential can be replaced"):
        kk.apply_keye_kernels(model, strict=True)


@pytest.mark.parametrize("function", [kk.apply_keye_kernels, kk.revert_keye_kernels])
def test_other_objects_raise_a_type_error(function):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        function("keye")


def test_reverting_an_unpatched_model_changes_nothing(model):
    kk.revert_keye_kernels(model)
    assert not instance_forwards(model)


def test_printed_report_groups_layers(model):
    lines = str(kk.apply_keye_kernels(model)).splitlines()
    assert lines[0] == "Qwen2VLForConditionalGeneration: 17 replaced, 2 left alone"
    assert "    model.visual.blocks.*.attn VisionAttention (x2), rope: rope_2d" in lines
    assert sum("model.language_model.layers.*.self_attn" in line for line in lines) == 2
