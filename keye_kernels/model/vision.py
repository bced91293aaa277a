"""The vision tower and the projector: all images of a batch are packed in one [T, C] axis, without padding.

The functions are shared by the lean model, the transformers model and the vLLM plugin, which differ in their modules (one fused
q, k, v projection, three, or tensor-parallel ones) and in the names of their parameters. The computation is described in
`docs/models/keye_vl_1_5.md` and `docs/models/keye_vl_preview.md`, sections "Vision tower" and "Projector".
Symbols: T patches, H heads, D head dim, C = H·D channels.
"""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from keye_kernels import ops
from keye_kernels.editions import edition_of
from keye_kernels.geometry import Order, VisionBatch
from keye_kernels.ops.implementation import impl_for
from keye_kernels.ops.linear import linear
from keye_kernels.pixel_norm import PixelNorm

from . import fused
from .config import KeyeConfig, VisionConfig
from .image_graphs import ImageGraphs
from .linear import FusedLinear, Linear, embedding
from .positions import inverse_frequencies

PIXEL_ORIGIN = 128
PROJECTOR_EPS = 1e-5  # a constant of the official code; the eps of the tower is in the config


def vision_batch(
    config: VisionConfig, grid_thw: Tensor, num_patches: int, segment_by_frame: bool, device: torch.device, order: Order = "block"
) -> VisionBatch:
    """The geometry of `grid_thw` [n, 3], built once per call of the tower and used by all its layers and by the projector.

    Raises ValueError if a grid is odd or empty, or the grids do not have `num_patches` patches.
    """
    options: dict[str, Any] = {"segment_by_frame": segment_by_frame, "order": order, "device": device}
    side, merge_size = config.table_side, config.spatial_merge_size
    return ops.build_vision_batch(grid_thw, num_patches, table_side=side, merge_size=merge_size, **options)


def vision_forward(
    pixel_values: Tensor,
    batch: VisionBatch,
    config: VisionConfig,
    *,
    embed_patches: Callable[[Tensor], Tensor],
    position_table: Tensor,
    layers: Iterable[Callable[[Tensor, VisionBatch, Tensor], Tensor]],
    post_layernorm: Callable[[Tensor], Tensor],
    impl: str = "auto",
) -> Tensor:
    """Runs the tower on patches [T, 3, 14, 14] in raster order; returns features [T, C] in the order of `batch`.

    `embed_patches` maps patches to [T, C]; floating-point ones get the dtype of `position_table` [table_side², C]. Each of
    `layers` maps (x [T, C], batch, inv_freq [D/4] float32) to [T, C]. `impl` is for the position embedding.
    """
    inv_freq = inverse_frequencies(config.rope_theta, config.head_dim // 4, pixel_values.device)
    dtype = position_table.dtype if pixel_values.is_floating_point() else pixel_values.dtype
    x = embed_patches(pixel_values.to(dtype)[batch.raster_index])
    x = ops.position_embedding_2d(x, position_table, batch, impl=impl)
    for layer in layers:
        x = layer(x, batch, inv_freq)
    return post_layernorm(x)


def vision_attention(
    x: Tensor, project_qkv: Callable, batch: VisionBatch, inv_freq: Tensor, impl: str = "auto", rope_impl: str = "auto"
) -> Tensor:
    """Rotates q and k by row and column, and attends within each segment; returns [T, H·D], before the output projection.

    `project_qkv` maps x [T, C] to q, k, v [T, H, D], with all heads or those of one tensor-parallel rank. It is a function, so
    that q and k are freed once they are rotated.
    """
    q, k, v = project_qkv(x)
    q, k = ops.rope_2d(q, k, batch.position_ids, inv_freq, impl=rope_impl)
    return ops.varlen_attention(q, k, v, batch.segments, impl=impl).flatten(1)


class VisionAttention(nn.Module):
    """Attention within each segment, with one fused projection to q, k and v."""

    def __init__(self, config: VisionConfig, impl: str):
        super().__init__()
        self.heads, self.head_dim, self.impl = config.num_attention_heads, config.head_dim, impl
        self.qkv_proj = FusedLinear(config.hidden_size, [config.hidden_size] * 3, bias=True)
        self.out_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, batch: VisionBatch, inv_freq: Tensor) -> Tensor:
        rope_impl = impl_for("rope_2d", self.impl)
        return self.out_proj(vision_attention(x, self._project_qkv, batch, inv_freq, impl=self.impl, rope_impl=rope_impl))

    def _project_qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view(-1, self.heads, self.head_dim) for t in self.qkv_proj(x))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(fused.linear_gelu(x, self.fc1))


class VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig, impl: str):
        super().__init__()
        self.impl = impl
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(config, impl)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor, batch: VisionBatch, inv_freq: Tensor) -> Tensor:
        x, normed = fused.add_norm(
            self.self_attn(fused.norm(x, self.layer_norm1, self.impl), batch, inv_freq), x, self.layer_norm2, self.impl
        )
        # Not self.mlp(...): a module call keeps its input in memory until it returns
        hidden = fused.linear_gelu(normed, self.mlp.fc1, self.impl)
        del normed
        out = self.mlp.fc2(hidden)
        del hidden
        return x + out


def pixel_scale_and_shift(norm: PixelNorm, pixels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[3 * pixels] float32 each: normalized = (pixel - PIXEL_ORIGIN) * scale + shift, for patches of `pixels` per channel.

    Made once per device: a copy to the GPU waits, and a CUDA graph cannot capture it.
    """
    # Tensors made in a trace or under a dispatch mode (fake tensors, for instance) must not enter the cache
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return _scale_and_shift(norm, pixels, device)
    return _cached_scale_and_shift(norm, pixels, device)


def _scale_and_shift(norm: PixelNorm, pixels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(x, device=device).repeat_interleave(pixels) for x in norm[:2])
    return norm.rescale_factor / std, (PIXEL_ORIGIN * norm.rescale_factor - mean) / std


@cache  # never evicted: CUDA graphs read the tensors
def _cached_scale_and_shift(norm: PixelNorm, pixels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    # Gradients need tensors that are not made in inference mode. The copy has ended before another stream reads it
    with torch.inference_mode(False):
        scale, shift = _scale_and_shift(norm, pixels, torch.device("cpu"))
        return scale.to(device), shift.to(device)


class VisionTower(nn.Module):
    """The tower of the lean model. Must agree with `SiglipVisionModel` of the official code."""

    def __init__(self, config: VisionConfig, segment_by_frame: bool, impl: str):
        super().__init__()
        self.config, self.segment_by_frame, self.impl = config, segment_by_frame, impl
        self.pixel_norm = PixelNorm()
        self.graphs = ImageGraphs()
        # A convolution with stride = kernel size is a matmul with [C, 3 * 14 * 14]
        self.patch_embedding = Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        self.position_embedding = embedding(config.table_side**2, config.hidden_size)
        self.layers = nn.ModuleList(VisionLayer(config, impl) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def _apply(self, *arguments: Any, **options: Any) -> "VisionTower":
        self.graphs.clear()  # they keep the parameters that are about to be moved or cast
        return super()._apply(*arguments, **options)

    def geometry(self, grid_thw: Tensor, num_patches: int) -> VisionBatch:
        """The geometry of `grid_thw` [n, 3] in block order, on the device of the tower."""
        device = self.patch_embedding.weight.device
        return vision_batch(self.config, grid_thw, num_patches, segment_by_frame=self.segment_by_frame, device=device)

    def forward(self, pixel_values: Tensor, batch: VisionBatch) -> Tensor:
        """Patches [T, 3, 14, 14] in raster order, normalized or uint8, to features [T, C] in the order of `batch`."""
        return vision_forward(
            pixel_values,
            batch,
            self.config,
            embed_patches=self._embed_patches,
            position_table=self.position_embedding.weight,
            layers=self.layers,
            post_layernorm=self.post_layernorm,
            impl=impl_for("position_embedding_2d", self.impl),
        )

    def _embed_patches(self, patches: Tensor) -> Tensor:
        """[T, 3, 14, 14] to [T, C]. The normalization of uint8 pixels is folded into the weights."""
        if patches.dtype != torch.uint8:
            return linear(patches.flatten(1), self.patch_embedding.weight, self.patch_embedding.bias)
        weight, bias = self._fold_normalization()
        # Pixels minus 128 are exact in every dtype, and their sums stay small
        return linear(patches.to(weight.dtype).sub_(PIXEL_ORIGIN).flatten(1), weight, bias)

    def _fold_normalization(self) -> tuple[Tensor, Tensor]:
        """Weight and bias for inputs `pixel - PIXEL_ORIGIN`, computed in each call, because the weights may have changed."""
        weight, bias = self.patch_embedding.weight, self.patch_embedding.bias
        scale, shift = pixel_scale_and_shift(self.pixel_norm, self.config.patch_size**2, weight.device)
        wide = weight.float()
        return (wide * scale).to(weight.dtype), (bias.float() + wide @ shift).to(bias.dtype)


class Projector(nn.Module):
    """`mlp_AR`: LayerNorm and 2x2 merge, in the order of the edition, then linear, GELU, linear."""

    def __init__(self, config: KeyeConfig, impl: str):
        super().__init__()
        vision = config.vision_config
        self.merge_size, self.impl = vision.spatial_merge_size, impl
        width = vision.hidden_size * self.merge_size**2
        norm_width = vision.hidden_size if edition_of(config.model_type).norm_before_merge else width
        self.pre_norm = nn.LayerNorm(norm_width, eps=PROJECTOR_EPS)
        self.linear_1 = nn.Linear(width, width)
        self.linear_2 = nn.Linear(width, config.hidden_size)

    def forward(self, features: Tensor, batch: VisionBatch) -> Tensor:
        """Maps features [T, C], in the order of `batch`, to embeddings [T/4, hidden]."""
        weights = [p for layer in (self.pre_norm, self.linear_1, self.linear_2) for p in (layer.weight, layer.bias)]
        return ops.patch_merge_projection(
            features, batch, *weights, merge_size=self.merge_size, eps=self.pre_norm.eps, impl=self.impl
        )
