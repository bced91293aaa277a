"""Modules of the lean model's vision tower: all images of a batch are packed in one [T, C] axis, without padding.

The forward is in `vision_forward`. Symbols: T patches, C channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keye_kernels.geometry import VisionBatch
from keye_kernels.ops.implementation import impl_for
from keye_kernels.ops.linear import linear
from keye_kernels.pixel_norm import PixelNorm

from .config import VisionConfig
from .linear import FusedLinear, Linear, embedding
from .vision_forward import vision_attention, vision_batch, vision_forward

PIXEL_ORIGIN = 128


class VisionAttention(nn.Module):
    """Attention within each segment, with one fused projection to q, k and v."""

    def __init__(self, config: VisionConfig, impl: str):
        super().__init__()
        self.heads, self.head_dim, self.impl = config.num_attention_heads, config.head_dim, impl
        self.qkv_proj = FusedLinear(config.hidden_size, [config.hidden_size] * 3, bias=True)
        self.out_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, batch: VisionBatch, inv_freq: Tensor) -> Tensor:
        rope_impl = impl_for("rope_2d", self.impl)
        return self.out_proj(
            vision_attention(x, self._project_qkv, batch, inv_freq, impl=self.impl, rope_impl=rope_impl)
        )

    def _project_qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view(-1, self.heads, self.head_dim) for t in self.qkv_proj(x))


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form. In place when no gradient is needed: this is the largest activation of the tower."""
    return (F.gelu if torch.is_grad_enabled() else torch.ops.aten.gelu_)(x, approximate="tanh")


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu_tanh(self.fc1(x)))


class VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig, impl: str):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(config, impl)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor, batch: VisionBatch, inv_freq: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), batch, inv_freq)
        # Not self.mlp(...): a module call keeps its input, the output of layer_norm2, in memory until it returns
        return x + self.mlp.fc2(gelu_tanh(self.mlp.fc1(self.layer_norm2(x))))


class VisionTower(nn.Module):
    """The tower of the lean model. Must agree with `SiglipVisionModel` of the official code.

    See `docs/models/keye_vl_1_5.md`, "Vision tower", and `docs/models/keye_vl_preview.md`, "Vision tower".

    Args:
        config: configuration of the tower.
        segment_by_frame: attention runs within single frames, see `keye_kernels.editions.Edition`.
        impl: implementation of its operators.
    """

    def __init__(self, config: VisionConfig, segment_by_frame: bool, impl: str):
        super().__init__()
        self.config, self.segment_by_frame, self.impl = config, segment_by_frame, impl
        self.pixel_norm = PixelNorm()
        # A convolution with stride = kernel size is a matmul with [C, 3 * 14 * 14]
        self.patch_embedding = Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        self.position_embedding = embedding(config.table_side**2, config.hidden_size)
        self.layers = nn.ModuleList(VisionLayer(config, impl) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def geometry(self, grid_thw: Tensor, num_patches: int) -> VisionBatch:
        """The geometry of `grid_thw` [n, 3] in block order, on the device of the tower."""
        device = self.patch_embedding.weight.device
        return vision_batch(self.config, grid_thw, num_patches, segment_by_frame=self.segment_by_frame, device=device)

    def forward(self, pixel_values: Tensor, batch: VisionBatch) -> Tensor:
        """Encodes patches.

        Args:
            pixel_values: [T, 3, 14, 14] in raster order, normalised, or uint8 pixels.
            batch: geometry of the patches, from `geometry`.

        Returns:
            Features [T, C] after the final norm, in the order of `batch`.
        """
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
        """[T, 3, 14, 14] to [T, C]. The normalisation of uint8 pixels is folded into the weights."""
        if patches.dtype != torch.uint8:
            return linear(patches.flatten(1), self.patch_embedding.weight, self.patch_embedding.bias)
        weight, bias = self._fold_normalisation()
        # Pixels minus 128 are exact in every dtype, and their sums stay small
        patches = patches.to(weight.dtype) - PIXEL_ORIGIN
        return linear(patches.flatten(1), weight, bias)

    def _fold_normalisation(self) -> tuple[Tensor, Tensor]:
        """Weight and bias for inputs `pixel - PIXEL_ORIGIN`, from w·((pixel·rescale - mean)/std) + b."""
        norm = self.pixel_norm
        weight, bias = self.patch_embedding.weight, self.patch_embedding.bias
        mean, std = (
            torch.tensor(x, device=weight.device).repeat_interleave(self.config.patch_size**2) for x in norm[:2]
        )
        shift = (PIXEL_ORIGIN * norm.rescale_factor - mean) / std
        folded = weight.float() * (norm.rescale_factor / std)
        return folded.to(weight.dtype), (bias.float() + weight.float() @ shift).to(bias.dtype)
