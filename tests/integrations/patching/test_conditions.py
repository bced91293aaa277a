"""Conditions under which a module can be patched, at their boundaries, and values that patched forwards must use."""

import pytest
import torch
from torch import nn

import keye_kernels as kk

pytest.importorskip("transformers")
from keye_kernels.integrations.patching.families import RULES
from keye_kernels.integrations.patching.forwards import as_grid_thw, mrope_section, with_rope
from keye_kernels.integrations.patching.report import ModuleReport, PatchReport
from tests.helpers.patched_families import build, instance_forwards, logits

FLOAT32 = {"atol": 1e-5, "rtol": 1e-5}
ATTENTION, ROTARY, TEXT_ROTARY = "model.visual.blocks.0.attn", "model.visual.rotary_pos_emb", "model.language_model.rotary_emb"


@pytest.fixture
def model() -> nn.Module:
    return build("qwen2_vl")


def obstacle(model: nn.Module, name: str, part: str) -> str | None:
    module = model.get_submodule(name)
    return RULES[type(module).__name__].obstacle(module, part)


@pytest.mark.parametrize(
    ("head_dim", "possible"), [(8, True), (72, True), (256, True), (264, False), (4, False), (12, False), (252, False)]
)
def test_head_dims_of_the_operator(model, head_dim, possible):
    model.get_submodule(ATTENTION).head_dim = head_dim
    for part in ("rope", "attention"):
        assert (obstacle(model, ATTENTION, part) is None) == possible


def test_dropout_prevents_attention_but_not_rope(model):
    model.get_submodule(ATTENTION).attention_dropout = 0.1
    assert obstacle(model, ATTENTION, "rope") is None
    assert obstacle(model, ATTENTION, "attention") == "its attention_dropout is 0.1, and varlen_attention has no dropout"


@pytest.mark.parametrize("name", ["qkv", "proj", "head_dim", "scaling"])
def test_missing_attributes_are_named(model, name):
    delattr(model.get_submodule(ATTENTION), name)
    assert obstacle(model, ATTENTION, "attention") == f"it has no {name} in this version"


@pytest.mark.parametrize(
    ("name", "attribute", "value", "message"),
    [
        (ROTARY, "rope_type", "default", None),
        (ROTARY, "rope_type", "axial", None),
        (ROTARY, "rope_type", "yarn", "'yarn'"),
        (ROTARY, "attention_scaling", 1.0, None),
        (ROTARY, "attention_scaling", 0.99, "by 0.99"),
        (TEXT_ROTARY, "attention_scaling", 0.99, "by 0.99"),
        (TEXT_ROTARY, "inv_freq", torch.ones(7), "mrope_section is .*2, 3, 3.*, not three numbers with sum 7"),
    ],
)
def test_rotary_modules(model, name, attribute, value, message):
    setattr(model.get_submodule(name), attribute, value)
    reason = obstacle(model, name, "rope")
    assert (reason is None) == (message is None)
    if message:
        report = kk.apply_keye_kernels(model)
        # Its whole rope group is left alone
        assert not any(item.part == "rope" and item.module.startswith(name.rpartition(".")[0]) for item in report.replaced)


@pytest.mark.parametrize(
    ("sections", "possible"), [([2, 3, 3], True), ([8, 0, 0], True), ([4, 4], False), ([2, 3, 2], False), ([2, 2, 2, 2], False)]
)
def test_mrope_sections(model, sections, possible):
    config = model.get_submodule(TEXT_ROTARY).config
    config.rope_parameters = {**config.rope_parameters, "mrope_section": sections}
    assert (obstacle(model, TEXT_ROTARY, "rope") is None) == possible


def test_mrope_sections_are_found_in_every_version():
    module = nn.Module()
    assert mrope_section(module) is None
    module.mrope_section = [1, 1, 1]
    assert mrope_section(module) == [1, 1, 1]
    module.config = type("Config", (), {"rope_scaling": {"type": "mrope", "mrope_section": (2, 2, 2)}})()
    assert mrope_section(module) == [2, 2, 2]
    module.config.rope_parameters = {"rope_theta": 1.0}
    assert mrope_section(module) == [2, 2, 2]
    module.config.rope_parameters = {"mrope_section": [3, 3, 3]}
    assert mrope_section(module) == [3, 3, 3]


def test_the_copy_of_a_forward_keeps_its_defaults():
    def forward(self, x, offset=1, *, factor=10):
        return rotate(x) * factor + offset  # noqa: F821  the function that is replaced

    copied = with_rope(forward, "rotate", lambda x: -x)
    assert copied(None, 5) == -49 and copied(None, 5, 2, factor=3) == -13


@pytest.mark.parametrize("name", [ATTENTION, ROTARY, "model.language_model.layers.0.self_attn"])
def test_a_forward_that_a_decorator_wrapped_keeps_its_rope(model, name):
    """It cannot be copied without the variables of the decorator, and may have other arguments."""
    module = model.get_submodule(name)
    forward = type(module).forward

    def wrapped(self, *args, **kwargs):
        if not args and not kwargs:
            apply_rotary_pos_emb_vision, apply_multimodal_rotary_pos_emb  # noqa: B018, F821  names that it calls
        return forward(self, *args, **kwargs)

    module.__class__ = type(type(module).__name__, (type(module),), {"forward": wrapped})
    expected = logits(model, "qwen2_vl")
    report = kk.apply_keye_kernels(model)
    assert name in {item.module for item in report.left_alone if item.part == "rope"}
    torch.testing.assert_close(logits(model, "qwen2_vl"), expected, **FLOAT32)


@pytest.mark.parametrize(
    ("family", "names", "attribute"),
    [
        ("qwen2_vl", ["model.visual.blocks.0.attn"], "scaling"),
        ("keye", [f"visual.vision_model.encoder.layers.{i}.self_attn" for i in (0, 1)], "scale"),
    ],
)
def test_the_softmax_scale_of_the_module_is_used(family, names, attribute):
    model = build(family)
    before = logits(model, family)
    for name in names:
        setattr(model.get_submodule(name), attribute, 1.5)
    expected = logits(model, family)
    assert (expected - before).abs().max() > 1e-3
    kk.apply_keye_kernels(model, strict=True)
    torch.testing.assert_close(logits(model, family), expected, **FLOAT32)


@pytest.mark.parametrize("family", ["qwen2_vl", "paddleocr_vl"])
def test_a_given_length_of_the_longest_segment_is_passed_on(family, monkeypatch):
    model = build(family)
    tower = model.model.visual
    attention = next(module for module in tower.modules() if type(module).__name__.endswith("VisionAttention"))
    kk.apply_keye_kernels(model, strict=True)
    longest, operator = [], kk.ops.varlen_attention
    monkeypatch.setattr(kk.ops, "varlen_attention", lambda *a, **k: longest.append(a[3].max_seqlen) or operator(*a, **k))
    positions = torch.zeros(20, 2, dtype=torch.int64), torch.rand(1, 18).expand(20, -1)
    for options in ({}, {"max_seqlen": 12}):
        attention(torch.randn(20, 144), cu_seqlens=torch.tensor([0, 8, 20]), position_embeddings=positions, **options)
    assert longest == [20, 12]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_kernel_size": (2, 1)}, r"it merges blocks of \(2, 1\) patches"),
        ({"linear_1": nn.Linear(576, 576, bias=False)}, "linear_1 is a Linear, not a torch.nn.Linear with a bias"),
        ({"linear_2": nn.Linear(576, 64, bias=False)}, "linear_2 is a Linear, not a torch.nn.Linear with a bias"),
        ({"pre_norm": nn.RMSNorm(144)}, "its norm is a RMSNorm"),
        ({"act": nn.SiLU()}, "its activation SiLU is not the exact GELU"),
        ({"act": None}, "it has no act in this version"),
    ],
    ids=["merge size", "first bias", "second bias", "norm", "activation", "no activation"],
)
def test_projectors(change, message):
    model = build("paddleocr_vl")
    ((name, value),) = change.items()
    setattr(model.model.projector, name, value)
    report = kk.apply_keye_kernels(model)
    (left,) = [item for item in report.left_alone if item.part == "projector"]
    assert left.missing
    with pytest.raises(ValueError, match=message):
        kk.apply_keye_kernels(model, strict=True)


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "forward"])
@pytest.mark.parametrize("layer", ["pre_norm", "linear_1", "linear_2"])
def test_a_layer_of_a_projector_that_does_more_than_its_weights_is_called(layer, kind):
    model, called = build("paddleocr_vl"), []
    expected = logits(model, "paddleocr_vl")
    kk.apply_keye_kernels(model, strict=True)
    module = model.model.projector.get_submodule(layer)
    if kind == "forward":
        module.forward = lambda x: called.append(1) or type(module).forward(module, x)
    else:
        getattr(module, kind)(lambda *_: called.append(1))
    torch.testing.assert_close(logits(model, "paddleocr_vl"), expected, **FLOAT32)
    assert called
    # A new call finds the same
    fresh = build("paddleocr_vl")
    fresh.model.projector.get_submodule(layer).register_forward_hook(lambda *_: None)
    assert "projector" in {item.part for item in kk.apply_keye_kernels(fresh).left_alone if item.missing}


def test_grids_may_be_tensors_of_numbers():
    assert as_grid_thw([(1, 4, 6), torch.tensor([2, 2, 2])]).tolist() == [[1, 4, 6], [2, 2, 2]]
    assert as_grid_thw(torch.tensor([[1, 4, 6]])).dtype == torch.int64


def test_a_report_is_grouped_by_module_class_part_and_note():
    def item(module, note="rope_2d", part="rope", class_name="A"):
        return ModuleReport(module, class_name, part, note)

    replaced = (item("blocks.0.attn"), item("blocks.11.attn"), item("blocks.1.attn", note="other"), item("v2.attn"), item(""))
    left = (item("blocks.0.attn", part="attention"), item("blocks.1.attn", part="attention", class_name="B"))
    assert str(PatchReport("Model", replaced, left, lambda: None)).splitlines() == [
        "Model: 5 replaced, 2 left alone",
        "  replaced:",
        "    blocks.*.attn A (x2), rope: rope_2d",
        "    blocks.*.attn A (x1), rope: other",
        "    v2.attn A (x1), rope: rope_2d",
        "    (the model itself) A (x1), rope: rope_2d",
        "  left alone:",
        "    blocks.*.attn A (x1), attention: rope_2d",
        "    blocks.*.attn B (x1), attention: rope_2d",
    ]


def test_reverting_a_part_of_a_model_leaves_the_rest(model):
    kk.apply_keye_kernels(model)
    before = instance_forwards(model)
    kk.revert_keye_kernels(model.model.language_model)
    left = instance_forwards(model)
    assert left == {name: forward for name, forward in before.items() if "language_model" not in name} != before
    kk.revert_keye_kernels(model.model.visual.merger)
    assert instance_forwards(model).keys() == left.keys() - {"model.visual.merger"}


def test_a_call_that_fails_in_strict_mode_keeps_what_was_replaced_before():
    model = build("qwen3_vl")
    kk.apply_keye_kernels(model, rope=False, projector=False)
    before = instance_forwards(model)
    with pytest.raises(ValueError, match="interleaves"):
        kk.apply_keye_kernels(model, strict=True)
    assert instance_forwards(model) == before
