"""The forwards that patched modules run.

Positions take the place of cos and sin: a patched rotary module returns them instead of its two tables, the model hands the
pair through to its attention layers as before, and their rope functions (in `rotate_text` and `rotate_vision`) take it.
All of them are named `forward`: pickle writes a bound method as its module and its name, so that a saved model holds nothing of
this package and runs its classes' own forwards when loaded.
B rows, S tokens of a row, T packed tokens or patches, H heads, D head dim.
"""

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from keye_kernels import ops
from keye_kernels.geometry import VisionBatch
from keye_kernels.integrations.plain import is_plain
from keye_kernels.layers import KeyeProjector


def as_forward(function: FunctionType) -> FunctionType:
    function.__name__ = "forward"
    return function


def mrope_section(rotary: nn.Module) -> list[int] | None:
    """The sections of a text model's rotary module, where its version keeps them; None where there are none."""
    config = getattr(rotary, "config", None)
    for parameters in (getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)):
        if isinstance(parameters, dict) and "mrope_section" in parameters:
            return list(parameters["mrope_section"])
    return getattr(rotary, "mrope_section", None)


@as_forward
def text_positions(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, tuple[Tensor, list[int]]]:
    """In place of cos and sin: positions [3, B, S], and ([D/2] frequencies, sections)."""
    inv_freq = self.inv_freq.to(x.device, torch.float32)
    return position_ids.expand(3, -1, -1).contiguous(), (inv_freq, mrope_section(self))


def rotate_text(
    q: Tensor, k: Tensor, position_ids: Tensor, frequencies: tuple[Tensor, list[int]], *_: Any
) -> tuple[Tensor, Tensor]:
    """In place of `apply_rotary_pos_emb(q, k, cos, sin)`: q, k [B, H, S, D]."""
    rows, _, length, _ = q.shape
    positions = position_ids.expand(3, rows, length).flatten(1)
    q, k = (x.transpose(1, 2).flatten(0, 1) for x in (q, k))
    turned = ops.rope_3d(q, k, positions, *frequencies)
    q, k = (x.unflatten(0, (rows, length)).transpose(1, 2) for x in turned)
    return q, k


@as_forward
def vision_positions(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """In place of cos and sin: positions [T, 2] and frequencies [T, D/4], every row the same.

    Qwen2.5-VL sorts both by windows, hence a row of frequencies for each patch; elsewhere it stays a view of one.
    """
    inv_freq = self.inv_freq.to(x.device, torch.float32)
    return position_ids, inv_freq.expand(position_ids.shape[0], -1)


def rotate_vision(q: Tensor, k: Tensor, position_ids: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """In place of `apply_rotary_pos_emb_vision(q, k, cos, sin)`: q, k [T, H, D]."""
    return ops.rope_2d(q, k, position_ids.T, inv_freq[0])


@cache
def with_rope(forward: FunctionType, name: str, rotate: Callable) -> FunctionType:
    """`forward` of a class, calling `rotate` where it calls the global function `name`; its caches and masks stay its own."""
    names = {**forward.__globals__, name: rotate}
    # torch.compile would look the names of a named module up in that module
    names.pop("__name__", None)
    copy = FunctionType(forward.__code__, names, "forward", forward.__defaults__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def separate_qkv(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """[..., C] to q, k, v [..., H, D] by three projections."""
    projections = (module.q_proj, module.k_proj, module.v_proj)
    return tuple(project(x).unflatten(-1, (-1, module.head_dim)) for project in projections)


def fused_qkv(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """[T, C] to q, k, v [T, H, D] by one projection."""
    return module.qkv(x).unflatten(-1, (3, -1, module.head_dim)).unbind(-3)


@cache
def packed_attention(project: Callable, rotate: Callable, out: str, with_weights: bool) -> Callable:
    """A vision attention of transformers: all segments in one call. `out` names its last projection.

    Attention weights are never made; where the module returns them (`with_weights`) they are None.
    """

    def forward(
        self: nn.Module,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, None]:
        q, k, v = project(self, hidden_states)
        q, k = rotate(q, k, *position_embeddings)
        # The number of patches is a bound that costs no look at the device
        longest = hidden_states.shape[0] if max_seqlen is None else max_seqlen
        attended = ops.varlen_attention(q, k, v, cu_seqlens.to(torch.int32), longest, softmax_scale=self.scaling)
        attended = getattr(self, out)(attended.flatten(1))
        return (attended, None) if with_weights else attended

    return forward


class TowerSegments(NamedTuple):
    """What Keye's own tower passes to its layers as `cu_seqlens`, once its encoder is patched."""

    cu_seqlens: Tensor
    position_ids: Tensor  # [2, T]
    inv_freq: Tensor


def takes_segments(module: nn.Module) -> bool:
    # accelerate keeps the forward that it hooks in `_old_forward`
    own = (module.__dict__.get(slot) for slot in ("forward", "_old_forward"))
    return any(getattr(forward, "__func__", None) is keye_vision_attention for forward in own)


@as_forward
def keye_encoder(self: nn.Module, inputs_embeds: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Keye's `SiglipEncoder`, the only place that knows positions: they travel to the layers beside `cu_seqlens`.

    Where the caller chose positions or windows of its own, or a layer no longer takes them, nothing is added and the layers
    use the tables.
    """
    chosen = kwargs.get("height_position_ids") is not None or kwargs.get("window_size", -1) > 0
    taken = all(takes_segments(layer.self_attn) for layer in self.layers)
    if taken and kwargs.get("use_rope") and not chosen and kwargs.get("cu_seqlens") is not None:
        grids = []
        for grid in kwargs["image_grid_thw"]:
            grids += grid if isinstance(grid, list) else [grid]
        batch = VisionBatch.build(
            torch.as_tensor([[int(size) for size in grid] for grid in grids]),
            inputs_embeds.shape[:-1].numel(),
            table_side=1,
            merge_size=1,
            order="raster",
            device=inputs_embeds.device,
        )
        inv_freq = self.rotary_pos_emb.inv_freq.to(inputs_embeds.device, torch.float32)
        kwargs["cu_seqlens"] = TowerSegments(kwargs["cu_seqlens"], batch.position_ids, inv_freq)
    return type(self).forward(self, inputs_embeds, *args, **kwargs)


@as_forward
def keye_vision_attention(
    self: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    output_attentions: bool | None = False,
    cu_seqlens: Tensor | TowerSegments | None = None,
    rope_emb: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Keye's `SiglipAttention` on [1, T, C]; without segments, or asked for weights, the class's own."""
    segments = cu_seqlens if isinstance(cu_seqlens, TowerSegments) else None
    cu_seqlens = segments.cu_seqlens if segments else cu_seqlens
    if cu_seqlens is None or output_attentions:
        own = type(self).forward
        return own(self, hidden_states, attention_mask, output_attentions, cu_seqlens=cu_seqlens, rope_emb=rope_emb)
    q, k, v = separate_qkv(self, hidden_states)
    if rope_emb is not None and not segments:
        q, k = type(self).forward.__globals__["apply_rotary_pos_emb_flashatt"](q, k, *rope_emb)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    if segments:
        q, k = ops.rope_2d(q, k, segments.position_ids, segments.inv_freq)
    longest = q.shape[0]
    attended = ops.varlen_attention(q, k, v, cu_seqlens.to(torch.int32), longest, softmax_scale=self.scale)
    return self.out_proj(attended.flatten(1)).view_as(hidden_states), None


def keye_projector(
    self: nn.Module, image_features: Tensor | list[Tensor], image_grid_thw: Any
) -> Tensor | list[Tensor]:
    """Keye's `Projector` on a list of pictures; a tensor, in which blocks lie side by side, goes the class's own way."""
    if isinstance(image_features, Tensor):
        return type(self).forward(self, image_features, image_grid_thw)
    grids = torch.as_tensor([[int(size) for size in grid] for grid in image_grid_thw])
    merged = KeyeProjector.forward(self, torch.cat(list(image_features)), grids)
    return list(merged.split((grids.prod(1) // 4).tolist()))


def while_plain(project: Callable, names: tuple[str, ...]) -> Callable:
    """`project` as long as the layers `names`, whose weights it reads, are plain; else the class's own forward.

    Asked on every call: adapters and hooks may come and go after the patch.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plain = is_plain(*(self.get_submodule(name) for name in names))
        return (project if plain else type(self).forward)(self, *args, **kwargs)

    return forward
