"""The forwards of patched modules.

A patched rotary module returns positions and frequencies instead of its cos and sin tables. The model passes this pair to its
attention layers, as it does with cos and sin, and their replaced rope functions (`rotate_text`, `rotate_vision`) use it.
All functions that become forwards are named `forward`: pickle stores a bound method as its instance and its name, so a saved
model contains nothing of this package, and a loaded one runs the forwards of its classes.
Symbols: B sequences, S tokens per sequence, T packed tokens or patches, H heads, D head dim, C channels.
"""

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from keye_kernels import ops
from keye_kernels.geometry import VisionBatch
from keye_kernels.layers import KeyeProjector
from keye_kernels.plain import is_plain
from keye_kernels.segments import Segments


def as_forward(function: FunctionType) -> FunctionType:
    """Names a function `forward`, for pickle; see above."""
    function.__name__ = "forward"
    return function


def mrope_section(rotary: nn.Module) -> list[int] | None:
    """The M-RoPE sections of a text model's rotary module, from wherever its transformers version stores them."""
    config = getattr(rotary, "config", None)
    for parameters in (getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)):
        if isinstance(parameters, dict) and "mrope_section" in parameters:
            return list(parameters["mrope_section"])
    return getattr(rotary, "mrope_section", None)


@as_forward
def text_positions(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, tuple[Tensor, list[int]]]:
    """Returns, instead of cos and sin, positions [3, B, S] and the pair (frequencies [D/2], sections)."""
    inv_freq = self.inv_freq.to(x.device, torch.float32)
    return position_ids.expand(3, -1, -1).contiguous(), (inv_freq, mrope_section(self))


def rotate_text(
    q: Tensor, k: Tensor, position_ids: Tensor, frequencies: tuple[Tensor, list[int]], *_: Any
) -> tuple[Tensor, Tensor]:
    """Replaces `apply_rotary_pos_emb(q, k, cos, sin)`; q, k [B, H, S, D]."""
    batch_size, _, length, _ = q.shape
    positions = position_ids.expand(3, batch_size, length).flatten(1)
    packed = (x.transpose(1, 2).flatten(0, 1) for x in (q, k))
    q, k = (x.unflatten(0, (batch_size, length)).transpose(1, 2) for x in ops.rope_3d(*packed, positions, *frequencies))
    return q, k


@as_forward
def vision_positions(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Returns, instead of cos and sin, positions [T, 2] and frequencies [T, D/4] (one row, expanded).

    Qwen2.5-VL reorders the rows of both tensors by window, so the frequencies need one row per patch.
    """
    inv_freq = self.inv_freq.to(x.device, torch.float32)
    return position_ids, inv_freq.expand(position_ids.shape[0], -1)


def rotate_vision(q: Tensor, k: Tensor, position_ids: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Replaces `apply_rotary_pos_emb_vision(q, k, cos, sin)`; q, k [T, H, D]."""
    return ops.rope_2d(q, k, position_ids.T, inv_freq[0])


@cache
def with_rope(forward: FunctionType, name: str, rotate: Callable) -> FunctionType:
    """A copy of a class's `forward` that calls `rotate` instead of the global function `name`. Nothing else changes."""
    names = {**forward.__globals__, name: rotate}
    # With a module name, torch.compile would look up globals in that module
    names.pop("__name__", None)
    copy = FunctionType(forward.__code__, names, "forward", forward.__defaults__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def separate_qkv(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """[..., C] to q, k, v [..., H, D] with three projections."""
    return tuple(p(x).unflatten(-1, (-1, module.head_dim)) for p in (module.q_proj, module.k_proj, module.v_proj))


def fused_qkv(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """[T, C] to q, k, v [T, H, D] with one projection."""
    return module.qkv(x).unflatten(-1, (3, -1, module.head_dim)).unbind(-3)


@cache
def packed_attention(project_qkv: Callable, rotate: Callable, out: str, returns_weights: bool) -> Callable:
    """The forward of a transformers vision attention with one attention call for all segments.

    `out` is the name of the output projection. Attention weights are not computed: if the original forward returns them
    (`returns_weights`), this one returns None for them.
    """

    def forward(
        self: nn.Module, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple, max_seqlen: Any = None, **_: Any
    ) -> Tensor | tuple[Tensor, None]:
        q, k, v = project_qkv(self, hidden_states)
        q, k = rotate(q, k, *position_embeddings)
        # The number of patches is an upper bound that needs no synchronization
        longest = hidden_states.shape[0] if max_seqlen is None else max_seqlen
        attended = ops.varlen_attention(q, k, v, Segments(cu_seqlens.to(torch.int32), longest), softmax_scale=self.scaling)
        attended = getattr(self, out)(attended.flatten(1))
        return (attended, None) if returns_weights else attended

    return forward


def as_grid_thw(grids: Any) -> Tensor:
    """[n, 3] integers from a list of (frames, rows, columns), or a tensor."""
    return torch.as_tensor([[int(size) for size in grid] for grid in grids])


class SegmentsWithPositions(NamedTuple):
    """Passed as `cu_seqlens` from Keye's patched vision encoder to its attention layers."""

    cu_seqlens: Tensor
    position_ids: Tensor  # [2, T]
    inv_freq: Tensor


def accepts_positions(module: nn.Module) -> bool:
    """Whether an attention layer of Keye's own code is patched, and so understands `SegmentsWithPositions`."""
    # accelerate moves the forward of a hooked module to `_old_forward`
    forwards = (module.__dict__.get(attribute) for attribute in ("forward", "_old_forward"))
    return any(getattr(forward, "__func__", None) is keye_vision_attention for forward in forwards)


@as_forward
def keye_encoder(self: nn.Module, inputs_embeds: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Forward of Keye's `SiglipEncoder`, which passes positions to its layers in `cu_seqlens`.

    If the caller passes positions or a window size, or a layer is not patched, the layers use the cos and sin tables.
    """
    caller_positions = kwargs.get("height_position_ids") is not None or kwargs.get("window_size", -1) > 0
    all_patched = all(accepts_positions(layer.self_attn) for layer in self.layers)
    if all_patched and kwargs.get("use_rope") and not caller_positions and kwargs.get("cu_seqlens") is not None:
        grids = []
        for grid in kwargs["image_grid_thw"]:
            grids += grid if isinstance(grid, list) else [grid]
        grid_thw, patches = as_grid_thw(grids), inputs_embeds.shape[:-1].numel()
        batch = VisionBatch.build(grid_thw, patches, table_side=1, merge_size=1, order="raster", device=inputs_embeds.device)
        inv_freq = self.rotary_pos_emb.inv_freq.to(inputs_embeds.device, torch.float32)
        kwargs["cu_seqlens"] = SegmentsWithPositions(kwargs["cu_seqlens"], batch.position_ids, inv_freq)
    return type(self).forward(self, inputs_embeds, *args, **kwargs)


@as_forward
def keye_vision_attention(
    self: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    output_attentions: bool | None = False,
    cu_seqlens: Tensor | SegmentsWithPositions | None = None,
    rope_emb: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Keye's `SiglipAttention` on [1, T, C]. If weights are requested or `cu_seqlens` is None, the class's own forward runs."""
    segments = cu_seqlens if isinstance(cu_seqlens, SegmentsWithPositions) else None
    cu_seqlens = segments.cu_seqlens if segments else cu_seqlens
    if cu_seqlens is None or output_attentions:
        original = type(self).forward
        return original(self, hidden_states, attention_mask, output_attentions, cu_seqlens=cu_seqlens, rope_emb=rope_emb)
    q, k, v = separate_qkv(self, hidden_states)
    if rope_emb is not None and not segments:
        q, k = type(self).forward.__globals__["apply_rotary_pos_emb_flashatt"](q, k, *rope_emb)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    if segments:
        q, k = ops.rope_2d(q, k, segments.position_ids, segments.inv_freq)
    attended = ops.varlen_attention(q, k, v, Segments(cu_seqlens.to(torch.int32), q.shape[0]), softmax_scale=self.scale)
    return self.out_proj(attended.flatten(1)).view_as(hidden_states), None


def keye_projector(self: nn.Module, image_features: Tensor | list[Tensor], image_grid_thw: Any) -> Tensor | list[Tensor]:
    """Keye's `Projector` on a list of images. A single tensor, already in block order, runs the class's own forward."""
    if isinstance(image_features, Tensor):
        return type(self).forward(self, image_features, image_grid_thw)
    grid_thw = as_grid_thw(image_grid_thw)
    # torch.cat copies a single tensor too
    features = image_features[0] if len(image_features) == 1 else torch.cat(list(image_features))
    merged = KeyeProjector.forward(self, features, grid_thw)
    return list(merged.split((grid_thw.prod(1) // 4).tolist()))


def if_plain(project: Callable, names: tuple[str, ...]) -> Callable:
    """A forward that runs `project`, which reads the weights of the layers `names`, if these are plain, else the class's forward.

    The check runs on every call, because adapters and hooks may be added or removed after patching.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plain = is_plain(*(self.get_submodule(name) for name in names))
        return (project if plain else type(self).forward)(self, *args, **kwargs)

    return forward
