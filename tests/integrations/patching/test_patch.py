"""How patches live on an instance: once, together with copies, devices, compilers, hooks, and gone when asked."""

import copy
import io
from types import MethodType

import pytest
import torch
from torch import nn

import keye_kernels as kk
from keye_kernels.integrations.patching.patch import patched_parts
from tests.helpers.tiny import CONFIG, tiny_model

pytest.importorskip("transformers")
from .models import BUILDERS, build, logits

FLOAT32 = {"atol": 1e-5, "rtol": 1e-5}
FAMILY = "qwen2_vl"


@pytest.fixture
def model() -> nn.Module:
    return build(FAMILY)


def forwards(model: nn.Module) -> dict[str, object]:
    return {name: module.__dict__["forward"] for name, module in model.named_modules() if "forward" in module.__dict__}


def test_twice_is_once(model):
    first = kk.apply_keye_kernels(model)
    before = forwards(model)
    second = kk.apply_keye_kernels(model, strict=True)
    assert forwards(model) == before
    assert (second.replaced, second.left_alone) == (first.replaced, first.left_alone)


def test_flags_add_up(model):
    together = build(FAMILY)
    kk.apply_keye_kernels(together)
    for flag in ("attention", "projector", "rope"):
        kk.apply_keye_kernels(model, **{f: f == flag for f in ("rope", "attention", "projector")})
    assert {name: f.__func__ for name, f in forwards(model).items()} == {
        name: f.__func__ for name, f in forwards(together).items()
    }


def test_what_was_not_asked_for_is_reported_so(model):
    report = kk.apply_keye_kernels(model, projector=False, strict=True)
    notes = {entry.module: entry.note for entry in report.left_alone}
    assert notes["model.visual.merger"] == "not asked for (projector=False)"


def test_other_instances_and_the_class_stay_as_they_are(model):
    other, own = build(FAMILY), type(model.model.visual.blocks[0].attn).forward
    kk.apply_keye_kernels(model)
    assert not forwards(other)
    assert type(model.model.visual.blocks[0].attn).forward is own


def test_context_manager_takes_back_what_it_did(model):
    with kk.apply_keye_kernels(model) as report:
        assert forwards(model) and report.replaced
    assert not forwards(model)


def test_context_manager_takes_back_after_an_exception(model):
    with pytest.raises(KeyError), kk.apply_keye_kernels(model):
        raise KeyError
    assert not forwards(model)


def test_context_manager_leaves_what_was_there_before(model):
    kk.apply_keye_kernels(model, attention=False, projector=False)
    before = forwards(model)
    with kk.apply_keye_kernels(model):
        assert forwards(model) != before
    assert forwards(model) == before


def test_a_report_takes_back_once(model):
    with kk.apply_keye_kernels(model) as report:
        pass
    kk.apply_keye_kernels(model)
    before = forwards(model)
    with report:
        pass
    assert forwards(model) == before


@pytest.mark.parametrize("part", ["blocks.0", "blocks.0.attn", "rotary_pos_emb"])
def test_a_part_that_exchanges_positions_with_the_rest_is_not_reverted_alone(model, part):
    expected = logits(model, FAMILY)
    kk.apply_keye_kernels(model)
    before = forwards(model)
    with pytest.raises(ValueError, match="exchanges positions with modules outside of it"):
        kk.revert_keye_kernels(model.model.visual.get_submodule(part))
    assert forwards(model) == before
    kk.revert_keye_kernels(model.model.visual)
    torch.testing.assert_close(logits(model, FAMILY), expected, **FLOAT32)
    assert forwards(model).keys() and not forwards(model.model.visual)


def test_a_part_without_rope_is_reverted_alone(model):
    kk.apply_keye_kernels(model, rope=False)
    kk.revert_keye_kernels(model.model.visual.blocks[0])
    assert forwards(model).keys() == {"model.visual.blocks.1.attn", "model.visual.merger"}


def test_copy_of_a_patched_model_runs_its_own_modules(model):
    expected = logits(model, FAMILY)
    kk.apply_keye_kernels(model)
    twin = copy.deepcopy(model)
    assert forwards(twin).keys() == forwards(model).keys()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(logits(twin, FAMILY), expected, **FLOAT32)
    kk.revert_keye_kernels(twin)
    assert forwards(model) and not forwards(twin)


@pytest.mark.parametrize("family", BUILDERS)
def test_a_saved_model_loads_without_the_patch(family):
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


def test_dtype_and_device_changes_keep_the_patch(model):
    expected = logits(model, FAMILY)
    kk.apply_keye_kernels(model)
    model.to(torch.float64)
    model.to(torch.float32).to("cpu")
    assert forwards(model)
    torch.testing.assert_close(logits(model, FAMILY), expected, **FLOAT32)


def operators_run(model: nn.Module) -> set[str]:
    with torch.profiler.profile() as profile:
        logits(model, FAMILY)
    return {event.name.removeprefix("keye_kernels::") for event in profile.events() if "keye_kernels" in event.name}


@pytest.mark.parametrize("patch_first", [True, False], ids=["patched-then-compiled", "compiled-then-patched"])
def test_compiled_modules_follow_the_patch_and_its_end(model, patch_first):
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
    assert operators_run(model) == {"rope", "patch_merge_projection"}
    kk.revert_keye_kernels(model)
    torch.testing.assert_close(logits(model, FAMILY), expected, **FLOAT32)
    assert not operators_run(model)


def test_a_compiled_model_can_be_handed_in(model):
    compiled = torch.compile(model, backend="eager")
    assert kk.apply_keye_kernels(compiled, strict=True).replaced
    assert forwards(model)
    kk.revert_keye_kernels(compiled)
    assert not forwards(model)


def test_layers_compile_into_one_graph(model):
    """The model's own vision attention cannot: it reads the length of every picture."""
    kk.apply_keye_kernels(model)
    tower, text = model.model.visual, model.model.language_model
    places, cu_seqlens = torch.randint(0, 5, (24, 2)), torch.tensor([0, 8, 24], dtype=torch.int32)
    positions = torch.arange(5).expand(3, 2, 5)

    def run(patches: torch.Tensor, embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pair = tower.rotary_pos_emb(patches, places)
        patches = tower.blocks[0](patches, cu_seqlens=cu_seqlens, position_embeddings=pair)
        return tower.merger(patches), text.layers[0](embeds, position_embeddings=text.rotary_emb(embeds, positions))

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for inputs in ((torch.randn(24, 144), torch.randn(2, 5, 64)) for _ in range(2)):
            torch.testing.assert_close(compiled(*inputs), run(*inputs), **FLOAT32)


@pytest.mark.parametrize("hooks_first", [True, False], ids=["hooked-then-patched", "patched-then-hooked"])
def test_hooks_of_accelerate_stay_in_front(model, hooks_first):
    hooks = pytest.importorskip("accelerate.hooks")
    seen = []

    class Watch(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    attention = model.model.visual.blocks[0].attn
    expected = logits(model, FAMILY)
    if hooks_first:
        hooks.add_hook_to_module(attention, Watch())
    kk.apply_keye_kernels(model, strict=True)
    if not hooks_first:
        hooks.add_hook_to_module(attention, Watch())
    assert kk.apply_keye_kernels(model).replaced
    torch.testing.assert_close(logits(model, FAMILY), expected, **FLOAT32)
    assert seen == [attention] * 2
    assert patched_parts(attention) == {"rope", "attention"}
    kk.revert_keye_kernels(model)
    assert torch.equal(logits(model, FAMILY), expected)
    assert len(seen) == 4
    hooks.remove_hook_from_module(attention)
    assert torch.equal(logits(model, FAMILY), expected)


def test_weights_that_accelerate_brings_in_are_never_read_past_it(model):
    expected = logits(model, FAMILY)
    model = pytest.importorskip("accelerate").cpu_offload(model, execution_device=torch.device("cpu"))
    report = kk.apply_keye_kernels(model)
    assert "hooks" in {entry.part: entry.note for entry in report.left_alone if entry.missing}["projector"]
    assert {entry.part for entry in report.replaced} == {"rope", "attention"}
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
def test_an_adapter_added_after_the_patch_takes_part(family, projector, layers):
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


def test_a_hook_added_to_a_projector_after_the_patch_runs(model):
    kk.apply_keye_kernels(model)
    seen = []
    handle = model.model.visual.merger.mlp[0].register_forward_hook(lambda *_: seen.append(1))
    expected = logits(model, FAMILY)
    assert seen and "patch_merge_projection" not in operators_run(model)
    handle.remove()
    assert "patch_merge_projection" in operators_run(model)
    torch.testing.assert_close(logits(model, FAMILY), expected, **FLOAT32)


def test_a_forward_that_somebody_else_replaced_is_left_alone(model):
    attention = model.model.visual.blocks[1].attn

    def somebody_else(self, *args, **kwargs):
        return type(self).forward(self, *args, **kwargs)

    attention.forward = MethodType(somebody_else, attention)
    expected = logits(model, FAMILY)
    report = kk.apply_keye_kernels(model)
    left = {(entry.module, entry.part): entry.note for entry in report.left_alone if entry.missing}
    assert "somebody_else" in left["model.visual.blocks.1.attn", "attention"]
    # One layer that wants cos and sin keeps the tower's rope as it is
    assert {name for name, part in left if part == "rope"} == {
        "model.visual.rotary_pos_emb",
        "model.visual.blocks.0.attn",
        "model.visual.blocks.1.attn",
    }
    torch.testing.assert_close(logits(model, FAMILY), expected, **FLOAT32)
    kk.revert_keye_kernels(model)
    assert forwards(model).keys() == {"model.visual.blocks.1.attn"}


def test_an_unknown_attention_class_keeps_the_rope_around_it(model):
    class AttentionOfTomorrow(type(model.model.visual.blocks[0].attn)):
        pass

    model.model.visual.blocks[0].attn.__class__ = AttentionOfTomorrow
    expected = logits(model, FAMILY)
    report = kk.apply_keye_kernels(model)
    notes = {(entry.module, entry.part): entry.note for entry in report.left_alone if entry.missing}
    assert notes["model.visual.blocks.0.attn", "attention"] == "nothing is known about its class"
    assert "model.visual.blocks.0.attn" in notes["model.visual.rotary_pos_emb", "rope"]
    torch.testing.assert_close(logits(model, FAMILY), expected, **FLOAT32)


@pytest.mark.parametrize(
    "path, attribute, value, words",
    [
        ("model.visual.blocks.0.attn", "attention_dropout", 0.1, "no dropout"),
        ("model.visual.blocks.0.attn", "head_dim", 36, "head dim 36"),
        ("model.visual.rotary_pos_emb", "attention_scaling", 1.5, "scales cos and sin by 1.5"),
        ("model.language_model.rotary_emb", "rope_type", "dynamic", "'dynamic'"),
        ("model.visual.merger.mlp", "1", nn.GELU(approximate="tanh"), "not the exact GELU"),
        ("model.visual.merger.mlp", "0", nn.Bilinear(576, 576, 576), "mlp.0 is a Bilinear"),
    ],
)
def test_what_does_not_fit_is_left_alone_with_the_reason(model, path, attribute, value, words):
    setattr(model.get_submodule(path), attribute, value)
    report = kk.apply_keye_kernels(model)
    assert any(words in entry.note for entry in report.left_alone if entry.missing)
    with pytest.raises(ValueError, match=words):
        kk.apply_keye_kernels(model, strict=True)


def transformers_shell() -> nn.Module:
    from keye_kernels.integrations.transformers.config import KeyeConfig
    from keye_kernels.integrations.transformers.modeling import KeyeForConditionalGeneration

    return KeyeForConditionalGeneration(KeyeConfig(**CONFIG))


@pytest.mark.parametrize("build_own", [tiny_model, transformers_shell])
def test_a_model_of_this_package_runs_the_operators_already(build_own):
    model = build_own()
    report = kk.apply_keye_kernels(model, strict=True)
    assert not report.replaced and not forwards(model)
    assert {entry.part for entry in report.left_alone} == {"attention", "projector"}
    assert {entry.note for entry in report.left_alone} == {"of keye_kernels: runs kk.ops already"}


def test_a_model_with_nothing_to_replace_says_so():
    model = nn.Sequential(nn.Linear(2, 2))
    report = kk.apply_keye_kernels(model)
    assert not report.replaced and not report.left_alone
    assert str(report) == "Sequential: nothing replaced, 0 left alone"
    with pytest.raises(ValueError, match="nothing in Sequential can be replaced"):
        kk.apply_keye_kernels(model, strict=True)


@pytest.mark.parametrize("function", [kk.apply_keye_kernels, kk.revert_keye_kernels])
def test_what_is_no_module_is_a_type_error(function):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        function("keye")


def test_revert_without_a_patch_changes_nothing(model):
    kk.revert_keye_kernels(model)
    assert not forwards(model)


def test_printed_report_groups_layers(model):
    lines = str(kk.apply_keye_kernels(model)).splitlines()
    assert lines[0] == "Qwen2VLForConditionalGeneration: 9 replaced, 2 left alone"
    assert "    model.visual.blocks.*.attn VisionAttention (x2), rope: rope_2d" in lines
    assert sum("model.language_model.layers.*.self_attn" in line for line in lines) == 2
