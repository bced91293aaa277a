"""Which modules can run this package's operators, by class name, and what has to hold for each.

A class name stands for a known `forward`; a version of transformers (or of a model's own code) that differs is an obstacle,
not an error. Read against transformers 5.23 and the layout of Keye's own `modeling_keye.py`.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import nn

from keye_kernels import layers
from keye_kernels.integrations.plain import is_plain

from . import forwards
from .report import Part

TEXT_ROPE_FUNCTIONS = ("apply_rotary_pos_emb", "apply_multimodal_rotary_pos_emb")
VISION_ROPE_FUNCTIONS = ("apply_rotary_pos_emb_vision",)
KEYE_ROPE_FUNCTIONS = ("apply_rotary_pos_emb_flashatt",)
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Role:
    """What a module can be to this package.

    parts: what its forward can take over, each with the words for the report.
    forward: from the module and the parts wanted to its new forward.
    obstacle: why this very module cannot take over a part, None where it can.
    rope_group: modules that exchange positions: all of them take over rope, or none. `gives_positions` tells the two sides.
    own: parts that stay the model's on purpose, and why.
    """

    parts: Mapping[Part, str] = field(default_factory=dict)
    forward: Callable[[nn.Module, frozenset[Part]], Callable] | None = None
    obstacle: Callable[[nn.Module, Part], str | None] = lambda module, part: None
    rope_group: str | None = None
    gives_positions: bool = False
    own: Mapping[Part, str] = field(default_factory=dict)


def rope_function(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """Which of the global functions `names` the forward of its class calls; None if none, or if it is wrapped."""
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
        return f"its frequencies are of type {module.rope_type!r}, which may change from call to call"
    if module.attention_scaling != 1.0:
        return f"it scales cos and sin by {module.attention_scaling}"
    return None


def text_rotary_obstacle(module: nn.Module, part: Part) -> str | None:
    if reason := rotary_obstacle(module, part):
        return reason
    sections, pairs = forwards.mrope_section(module), module.inv_freq.shape[0]
    if sections is None or len(sections) != 3 or sum(sections) != pairs:
        return f"its mrope_section is {sections}, not three numbers adding up to {pairs}"
    return None


def rope_function_obstacle(names: tuple[str, ...], module: nn.Module, part: Part) -> str | None:
    if rope_function(module, names) is None:
        return f"the forward of its class does not itself call {' or '.join(names)} in this version"
    return None


def vision_attention_obstacle(
    attributes: tuple[str, ...], names: tuple[str, ...], module: nn.Module, part: Part
) -> str | None:
    if reason := attribute_obstacle(attributes, module):
        return reason
    dropout = getattr(module, "attention_dropout", getattr(module, "dropout", 0.0))
    if part == "attention" and dropout:
        return f"varlen_attention has no dropout, its attention_dropout is {dropout}"
    if module.head_dim % 8 or module.head_dim > MAX_HEAD_DIM:
        return f"its head dim {module.head_dim} is not a multiple of 8 up to {MAX_HEAD_DIM}"
    return rope_function_obstacle(names, module, part)


def interleaved_obstacle(module: nn.Module, part: Part) -> str | None:
    return "its M-RoPE interleaves time, height and width pair by pair; rope_3d takes them in sections"


def projector_obstacle(names: tuple[str, str, str, str], module: nn.Module, part: Part) -> str | None:
    """`names` of the norm, the first linear layer, the activation and the second linear layer."""
    children = dict(module.named_modules())
    if absent := [name for name in names if name not in children]:
        return f"it has no {', '.join(absent)} in this version"
    norm, linear_1, activation, linear_2 = (children[name] for name in names)
    if type(norm) is not nn.LayerNorm:
        return f"its norm is a {type(norm).__name__}, patch_merge_projection has LayerNorm"
    for name, layer in zip(names[1::2], (linear_1, linear_2), strict=True):
        if type(layer) is not nn.Linear or layer.bias is None:
            return f"{name} is a {type(layer).__name__}, not a torch.nn.Linear with a bias"
    if not is_plain(norm, linear_1, linear_2):
        return "its layers have hooks or forwards of their own (of accelerate, for one), which would not run"
    probe = torch.linspace(-3, 3, 13)
    if not torch.allclose(activation(probe), F.gelu(probe), atol=1e-6):
        return f"its activation {type(activation).__name__} is not the exact GELU"
    if getattr(module, "merge_kernel_size", (2, 2)) != (2, 2):
        return f"it merges {module.merge_kernel_size} patches"
    return None


def text_attention_forward(module: nn.Module, parts: frozenset[Part]) -> Callable:
    return forwards.with_rope(type(module).forward, rope_function(module, TEXT_ROPE_FUNCTIONS), forwards.rotate_text)


def vision_attention_forward(
    project: Callable, out: str, with_weights: bool, module: nn.Module, parts: frozenset[Part]
) -> Callable:
    own, name = type(module).forward, rope_function(module, VISION_ROPE_FUNCTIONS)
    if "attention" not in parts:
        return forwards.with_rope(own, name, forwards.rotate_vision)
    rotate = forwards.rotate_vision if "rope" in parts else own.__globals__[name]
    return forwards.packed_attention(project, rotate, out, with_weights)


def fixed(forward: Callable) -> Callable[[nn.Module, frozenset[Part]], Callable]:
    return lambda module, parts: forward


def projector(forward: Callable, norm: str, linear_1: str, activation: str, linear_2: str) -> Role:
    obstacle = partial(projector_obstacle, (norm, linear_1, activation, linear_2))
    forward = forwards.while_plain(forward, (norm, linear_1, linear_2))
    return Role({"projector": "patch_merge_projection"}, fixed(forward), obstacle)


def vision_attention(project: Callable, attributes: tuple[str, ...], *, with_weights: bool) -> Role:
    """`attributes` end with the name of the last projection."""
    return Role(
        {"rope": "rope_2d", "attention": "varlen_attention, one call for all segments"},
        partial(vision_attention_forward, project, attributes[-1], with_weights),
        partial(vision_attention_obstacle, (*attributes, "head_dim", "scaling"), VISION_ROPE_FUNCTIONS),
        rope_group="vision",
    )


SEPARATE_QKV = ("q_proj", "k_proj", "v_proj", "out_proj")
TEXT_OWN = {"attention": "the text model's own, with its masks and cache"}
VISION_ROTARY = Role(
    {"rope": "hands positions to rope_2d, makes no tables"},
    fixed(forwards.vision_positions),
    rotary_obstacle,
    rope_group="vision",
    gives_positions=True,
)
TEXT_ROTARY = Role(
    {"rope": "hands positions to rope_3d, makes no tables"},
    fixed(forwards.text_positions),
    text_rotary_obstacle,
    rope_group="text",
    gives_positions=True,
)
TEXT_ATTENTION = Role(
    {"rope": "rope_3d"},
    text_attention_forward,
    partial(rope_function_obstacle, TEXT_ROPE_FUNCTIONS),
    rope_group="text",
    own=TEXT_OWN,
)
KEYE_ENCODER = Role(
    {"rope": "hands positions to rope_2d"},
    fixed(forwards.keye_encoder),
    lambda module, part: attribute_obstacle(("layers", "rotary_pos_emb"), module),
    rope_group="keye vision",
    gives_positions=True,
)
KEYE_VISION_ATTENTION = Role(
    {"attention": "varlen_attention, one call for all segments; rope_2d where its encoder hands positions"},
    fixed(forwards.keye_vision_attention),
    partial(vision_attention_obstacle, (*SEPARATE_QKV, "head_dim", "scale"), KEYE_ROPE_FUNCTIONS),
    rope_group="keye vision",
)
INTERLEAVED = Role({"rope": "rope_3d"}, obstacle=interleaved_obstacle, rope_group="text")
FUSED = vision_attention(forwards.fused_qkv, ("qkv", "proj"), with_weights=False)

ROLES: dict[str, Role] = {
    # Keye's own code (Preview and 1.5); its text rope is that of Qwen2-VL
    "SiglipEncoder": KEYE_ENCODER,
    "SiglipAttention": KEYE_VISION_ATTENTION,
    "SigLIPRotaryEmbedding": Role(own={"rope": "its frequencies are read; its tables, made once a call, are not"}),
    "SiglipMultiheadAttentionPoolingHead": Role(own={"attention": "a pooling head, which Keye does not use"}),
    "Projector": projector(forwards.keye_projector, "pre_norm", "linear_1", "act", "linear_2"),
    "KeyeRotaryEmbedding": TEXT_ROTARY,
    "KeyeAttention": TEXT_ATTENTION,
    "KeyeFlashAttention2": TEXT_ATTENTION,
    "KeyeSdpaAttention": TEXT_ATTENTION,
    # PaddleOCR-VL
    "PaddleOCRVisionRotaryEmbedding": VISION_ROTARY,
    "PaddleOCRVisionAttention": vision_attention(forwards.separate_qkv, SEPARATE_QKV, with_weights=True),
    "PaddleOCRProjector": projector(layers.KeyeProjector.forward, "pre_norm", "linear_1", "act", "linear_2"),
    "PaddleOCRRotaryEmbedding": TEXT_ROTARY,
    "PaddleOCRAttention": TEXT_ATTENTION,
    # Qwen2-VL
    "Qwen2VLVisionRotaryEmbedding": VISION_ROTARY,
    "VisionAttention": FUSED,
    "PatchMerger": projector(layers.Qwen2VLPatchMerger.forward, "ln_q", "mlp.0", "mlp.1", "mlp.2"),
    "Qwen2VLRotaryEmbedding": TEXT_ROTARY,
    "Qwen2VLAttention": TEXT_ATTENTION,
    # Qwen2.5-VL
    "Qwen2_5_VLVisionRotaryEmbedding": VISION_ROTARY,
    "Qwen2_5_VLVisionAttention": FUSED,
    "Qwen2_5_VLPatchMerger": projector(layers.Qwen2VLPatchMerger.forward, "ln_q", "mlp.0", "mlp.1", "mlp.2"),
    "Qwen2_5_VLRotaryEmbedding": TEXT_ROTARY,
    "Qwen2_5_VLAttention": TEXT_ATTENTION,
    # Qwen3-VL
    "Qwen3VLVisionRotaryEmbedding": VISION_ROTARY,
    "Qwen3VLVisionAttention": FUSED,
    "Qwen3VLVisionPatchMerger": projector(
        layers.Qwen3VLPatchMerger.forward, "norm", "linear_fc1", "act_fn", "linear_fc2"
    ),
    "Qwen3VLTextRotaryEmbedding": INTERLEAVED,
    "Qwen3VLTextAttention": Role({"rope": "rope_3d"}, obstacle=interleaved_obstacle, rope_group="text", own=TEXT_OWN),
}
