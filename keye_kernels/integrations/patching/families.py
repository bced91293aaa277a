"""Which module classes can run this package's operators, how they are patched, and under which conditions.

Classes are found by name (`RULES`). The checks below verify that a module has the expected attributes and forward; if another
version of transformers or of a model's own code differs, the module is left alone and the report gives the reason. Written
for transformers 5.23 and the layout of Keye's own `modeling_keye.py`.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import nn

from keye_kernels import layers
from keye_kernels.plain import is_plain

from . import elementwise, forwards
from .report import Part

TEXT_ROPE_FUNCTIONS = ("apply_rotary_pos_emb", "apply_multimodal_rotary_pos_emb")
VISION_ROPE_FUNCTIONS = ("apply_rotary_pos_emb_vision",)
KEYE_ROPE_FUNCTIONS = ("apply_rotary_pos_emb_flashatt",)
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class PatchRule:
    """How modules of one class are patched. The parts that can be replaced have a note for the report, `kept` ones a reason.

    `obstacle` returns the reason why a part of a module cannot be replaced, or None. Modules of one `rope_group` exchange
    positions, so rope is replaced in all of them or in none: a class produces the positions of its group or consumes them.
    """

    parts: Mapping[Part, str] = field(default_factory=dict)
    make_forward: Callable[[nn.Module, frozenset[Part]], Callable] | None = None
    obstacle: Callable[[nn.Module, Part], str | None] = lambda module, part: None
    rope_group: str | None = None
    produces_positions: bool = False
    kept: Mapping[Part, str] = field(default_factory=dict)


def rope_function(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """Which of the global functions `names` the forward of the class calls. None if it calls none or is wrapped."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or forward.__closure__:
        return None
    return next((name for name in names if name in forward.__code__.co_names), None)


def attribute_obstacle(names: tuple[str, ...], module: nn.Module) -> str | None:
    absent = [name for name in names if not hasattr(module, name)]
    return f"it has no {', '.join(absent)} in this version" if absent else None


def rotary_obstacle(module: nn.Module, part: Part) -> str | None:
    if reason := attribute_obstacle(("inv_freq", "attention_scaling"), module):
        return reason
    arguments = list(inspect.signature(type(module).forward).parameters)[1:]
    if arguments != ["x", "position_ids"]:
        return f"its forward takes ({', '.join(arguments)}) in this version, not (x, position_ids)"
    if getattr(module, "rope_type", "default") not in ("default", "axial"):
        return f"its rope_type is {module.rope_type!r}; the frequencies must not change between calls"
    if module.attention_scaling != 1.0:
        return f"it scales cos and sin by {module.attention_scaling}"
    return None


def text_rotary_obstacle(module: nn.Module, part: Part) -> str | None:
    if reason := rotary_obstacle(module, part):
        return reason
    sections, pairs = forwards.mrope_section(module), module.inv_freq.shape[0]
    if sections is None or len(sections) != 3 or sum(sections) != pairs:
        return f"its mrope_section is {sections}, not three numbers with sum {pairs}"
    return None


def rope_function_obstacle(names: tuple[str, ...], module: nn.Module, part: Part) -> str | None:
    if rope_function(module, names) is None:
        return f"the forward of its class does not call {' or '.join(names)} directly in this version"
    return None


def vision_attention_obstacle(attributes: tuple[str, ...], names: tuple[str, ...], module: nn.Module, part: Part) -> str | None:
    if reason := attribute_obstacle(attributes, module):
        return reason
    dropout = getattr(module, "attention_dropout", getattr(module, "dropout", 0.0))
    if part == "attention" and dropout:
        return f"its attention_dropout is {dropout}, and varlen_attention has no dropout"
    if module.head_dim % 8 or module.head_dim > MAX_HEAD_DIM:
        return f"its head dim {module.head_dim} is not a multiple of 8 up to {MAX_HEAD_DIM}"
    return rope_function_obstacle(names, module, part)


def projector_obstacle(names: tuple[str, str, str, str], module: nn.Module, part: Part) -> str | None:
    """`names`: the submodules norm, first linear layer, activation and second linear layer."""
    children = dict(module.named_modules())
    if absent := [name for name in names if name not in children]:
        return f"it has no {', '.join(absent)} in this version"
    norm, linear_1, activation, linear_2 = (children[name] for name in names)
    if type(norm) is not nn.LayerNorm:
        return f"its norm is a {type(norm).__name__}, and patch_merge_projection computes LayerNorm"
    for name, layer in zip(names[1::2], (linear_1, linear_2), strict=True):
        if type(layer) is not nn.Linear or layer.bias is None:
            return f"{name} is a {type(layer).__name__}, not a torch.nn.Linear with a bias"
    if not is_plain(norm, linear_1, linear_2):
        return "its layers have hooks or replaced forwards (accelerate's, for example), which the operator would skip"
    x = torch.linspace(-3, 3, 13)
    if not torch.allclose(activation(x), F.gelu(x), atol=1e-6):
        return f"its activation {type(activation).__name__} is not the exact GELU"
    if getattr(module, "merge_kernel_size", (2, 2)) != (2, 2):
        return f"it merges blocks of {module.merge_kernel_size} patches, not (2, 2)"
    return None


def text_attention_forward(module: nn.Module, parts: frozenset[Part]) -> Callable:
    return forwards.with_rope(type(module).forward, rope_function(module, TEXT_ROPE_FUNCTIONS), forwards.rotate_text)


def vision_attention_forward(
    project_qkv: Callable, out: str, returns_weights: bool, module: nn.Module, parts: frozenset[Part]
) -> Callable:
    original, name = type(module).forward, rope_function(module, VISION_ROPE_FUNCTIONS)
    if "attention" not in parts:
        return forwards.with_rope(original, name, forwards.rotate_vision)
    rotate = forwards.rotate_vision if "rope" in parts else original.__globals__[name]
    return forwards.packed_attention(project_qkv, rotate, out, returns_weights)


def always(forward: Callable) -> Callable[[nn.Module, frozenset[Part]], Callable]:
    """A `make_forward` that returns the same forward for every module."""
    return lambda module, parts: forward


def projector(forward: Callable, norm: str, linear_1: str, activation: str, linear_2: str) -> PatchRule:
    obstacle = partial(projector_obstacle, (norm, linear_1, activation, linear_2))
    forward = forwards.if_plain(forward, (norm, linear_1, linear_2))
    return PatchRule({"projector": "patch_merge_projection"}, always(forward), obstacle)


def rotary(operator: str, forward: Callable, obstacle: Callable, group: str) -> PatchRule:
    note = f"passes positions to {operator} instead of cos and sin tables"
    return PatchRule({"rope": note}, always(forward), obstacle, group, produces_positions=True)


def vision_attention(project_qkv: Callable, projections: tuple[str, ...], *, returns_weights: bool) -> PatchRule:
    """`projections`: names of the linear layers; the last is the output projection."""
    return PatchRule(
        {"rope": "rope_2d", "attention": "varlen_attention, one call for all segments"},
        partial(vision_attention_forward, project_qkv, projections[-1], returns_weights),
        partial(vision_attention_obstacle, (*projections, "head_dim", "scaling"), VISION_ROPE_FUNCTIONS),
        rope_group="vision",
    )


def layer(*names: str, returns_weights: bool = False) -> PatchRule:
    """`names`: the submodules first norm, attention, second norm and MLP."""
    forward = elementwise.layer_forward(names, returns_weights)
    return PatchRule({"elementwise": ADD_NORM}, always(forward), partial(elementwise.layer_obstacle, names))


def mlp(*names: str, activation: str) -> PatchRule:
    """`names`: the linear layers, two, or the gate and the two of a gated MLP."""
    note = "silu_mul" if len(names) == 3 else "bias and GELU in the first matmul, or QuickGELU in one pass"
    make_forward = partial(elementwise.mlp_forward, names, activation)
    return PatchRule({"elementwise": note}, make_forward, partial(elementwise.mlp_obstacle, names, activation))


ADD_NORM = "add_norm: residual add and norm in one launch"
SEPARATE_QKV = ("q_proj", "k_proj", "v_proj", "out_proj")
TEXT_KEPT = {"attention": "text attention is not replaced, because of its masks and cache"}
VISION_ROTARY = rotary("rope_2d", forwards.vision_positions, rotary_obstacle, "vision")
TEXT_ROTARY = rotary("rope_3d", forwards.text_positions, text_rotary_obstacle, "text")
TEXT_ATTENTION = PatchRule(
    {"rope": "rope_3d"}, text_attention_forward, partial(rope_function_obstacle, TEXT_ROPE_FUNCTIONS), "text", kept=TEXT_KEPT
)
KEYE_ENCODER = PatchRule(
    {"rope": "passes positions to rope_2d"},
    always(forwards.keye_encoder),
    lambda module, part: attribute_obstacle(("layers", "rotary_pos_emb"), module),
    rope_group="keye vision",
    produces_positions=True,
)
KEYE_VISION_ATTENTION = PatchRule(
    {"attention": "varlen_attention, one call for all segments; rope_2d if its encoder passes positions"},
    always(forwards.keye_vision_attention),
    partial(vision_attention_obstacle, (*SEPARATE_QKV, "head_dim", "scale"), KEYE_ROPE_FUNCTIONS),
    rope_group="keye vision",
)
KEYE_LAYER_NAMES = ("layer_norm1", "self_attn", "layer_norm2", "mlp")
KEYE_LAYER = PatchRule(
    {"elementwise": ADD_NORM}, always(elementwise.keye_layer), partial(elementwise.layer_obstacle, KEYE_LAYER_NAMES)
)
TEXT_LAYER = layer("input_layernorm", "self_attn", "post_attention_layernorm", "mlp", returns_weights=True)
TEXT_MLP = mlp("gate_proj", "up_proj", "down_proj", activation="act_fn")
QWEN_LAYER = layer("norm1", "attn", "norm2", "mlp")
INTERLEAVED = "its M-RoPE interleaves the frequencies of time, height and width; rope_3d expects contiguous sections"
INTERLEAVED_ROTARY = PatchRule({"rope": "rope_3d"}, obstacle=lambda module, part: INTERLEAVED, rope_group="text")
INTERLEAVED_ATTENTION = replace(INTERLEAVED_ROTARY, kept=TEXT_KEPT)
FUSED_QKV_ATTENTION = vision_attention(forwards.fused_qkv, ("qkv", "proj"), returns_weights=False)

RULES: dict[str, PatchRule] = {
    # Keye's own code (Preview and 1.5); text rope is Qwen2-VL's function
    "SiglipEncoder": KEYE_ENCODER,
    "SiglipAttention": KEYE_VISION_ATTENTION,
    "SiglipEncoderLayer": KEYE_LAYER,
    "SiglipMLP": mlp("fc1", "fc2", activation="activation_fn"),
    "SigLIPRotaryEmbedding": PatchRule(kept={"rope": "rope_2d reads its frequencies; its table is computed, but not used"}),
    "SiglipMultiheadAttentionPoolingHead": PatchRule(kept={"attention": "pooling head, not used by Keye"}),
    "Projector": projector(forwards.keye_projector, "pre_norm", "linear_1", "act", "linear_2"),
    "KeyeRotaryEmbedding": TEXT_ROTARY,
    "KeyeAttention": TEXT_ATTENTION,
    "KeyeFlashAttention2": TEXT_ATTENTION,
    "KeyeSdpaAttention": TEXT_ATTENTION,
    # PaddleOCR-VL
    "PaddleOCRVisionRotaryEmbedding": VISION_ROTARY,
    "PaddleOCRVisionAttention": vision_attention(forwards.separate_qkv, SEPARATE_QKV, returns_weights=True),
    "PaddleOCRVisionEncoderLayer": layer(*KEYE_LAYER_NAMES, returns_weights=True),
    "PaddleOCRVisionMLP": mlp("fc1", "fc2", activation="activation_fn"),
    "PaddleOCRProjector": projector(layers.KeyeProjector.forward, "pre_norm", "linear_1", "act", "linear_2"),
    "PaddleOCRRotaryEmbedding": TEXT_ROTARY,
    "PaddleOCRAttention": TEXT_ATTENTION,
    "PaddleOCRDecoderLayer": TEXT_LAYER,
    "PaddleOCRMLP": TEXT_MLP,
    # Qwen2-VL
    "Qwen2VLVisionRotaryEmbedding": VISION_ROTARY,
    "VisionAttention": FUSED_QKV_ATTENTION,
    "Qwen2VLVisionBlock": QWEN_LAYER,
    "VisionMlp": mlp("fc1", "fc2", activation="act"),
    "PatchMerger": projector(layers.Qwen2VLPatchMerger.forward, "ln_q", "mlp.0", "mlp.1", "mlp.2"),
    "Qwen2VLRotaryEmbedding": TEXT_ROTARY,
    "Qwen2VLAttention": TEXT_ATTENTION,
    "Qwen2VLDecoderLayer": TEXT_LAYER,
    "Qwen2MLP": TEXT_MLP,
    # Qwen2.5-VL
    "Qwen2_5_VLVisionRotaryEmbedding": VISION_ROTARY,
    "Qwen2_5_VLVisionAttention": FUSED_QKV_ATTENTION,
    "Qwen2_5_VLVisionBlock": QWEN_LAYER,
    "Qwen2_5_VLMLP": mlp("gate_proj", "up_proj", "down_proj", activation="act_fn"),
    "Qwen2_5_VLPatchMerger": projector(layers.Qwen2VLPatchMerger.forward, "ln_q", "mlp.0", "mlp.1", "mlp.2"),
    "Qwen2_5_VLRotaryEmbedding": TEXT_ROTARY,
    "Qwen2_5_VLAttention": TEXT_ATTENTION,
    "Qwen2_5_VLDecoderLayer": TEXT_LAYER,
    # Qwen3-VL
    "Qwen3VLVisionRotaryEmbedding": VISION_ROTARY,
    "Qwen3VLVisionAttention": FUSED_QKV_ATTENTION,
    "Qwen3VLVisionBlock": QWEN_LAYER,
    "Qwen3VLVisionMLP": mlp("linear_fc1", "linear_fc2", activation="act_fn"),
    "Qwen3VLVisionPatchMerger": projector(layers.Qwen3VLPatchMerger.forward, "norm", "linear_fc1", "act_fn", "linear_fc2"),
    "Qwen3VLTextRotaryEmbedding": INTERLEAVED_ROTARY,
    "Qwen3VLTextAttention": INTERLEAVED_ATTENTION,
    "Qwen3VLTextDecoderLayer": TEXT_LAYER,
    "Qwen3VLTextMLP": TEXT_MLP,
}
