"""The vision tower: patches to features, all pictures packed in one [T, C] axis."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keye_kernels import ops
from keye_kernels.geometry import VisionBatch
from keye_kernels.ops.implementation import impl_outside_attention
from keye_kernels.ops.linear import linear
from keye_kernels.pixel_norm import PixelNorm

from .config import VisionConfig
from .linear import FusedLinear, Linear, embedding
from .positions import inverse_frequencies

PIXEL_ORIGIN = 128


class VisionAttention(nn.Module):
    """Non-causal attention within each segment; rows and columns enter by rotation of q and k."""

    def __init__(self, config: VisionConfig, impl: str):
        super().__init__()
        self.heads, self.head_dim, self.impl = config.num_attention_heads, config.head_dim, impl
        self.qkv_proj = FusedLinear(config.hidden_size, [config.hidden_size] * 3, bias=True)
        self.out_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, batch: VisionBatch, inv_freq: Tensor) -> Tensor:
        q, k, v = (t.view(-1, self.heads, self.head_dim) for t in self.qkv_proj(x))
        q, k = ops.rope_2d(q, k, batch.position_ids, inv_freq, impl=impl_outside_attention(self.impl))
        out = ops.varlen_attention(q, k, v, batch.cu_seqlens, batch.max_seqlen, impl=self.impl)
        return self.out_proj(out.flatten(1))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def widen(self, x: Tensor) -> Tensor:
        # Nothing is as wide: unless a gradient needs it, it is there once in place of twice
        gelu = F.gelu if torch.is_grad_enabled() else torch.ops.aten.gelu_
        return gelu(self.fc1(x), approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.widen(x))


class VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig, impl: str):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(config, impl)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor, batch: VisionBatch, inv_freq: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), batch, inv_freq)
        # In two steps: a call of the whole would hold the normalised patches beside what is four times as wide
        return x + self.mlp.fc2(self.mlp.widen(self.layer_norm2(x)))


class VisionTower(nn.Module):
    """Must agree with `SiglipVisionModel` of the official code (specification of 1.5, section 4).

    Preview attends within a whole picture or video, 1.5 within single frames.
    """

    def __init__(self, config: VisionConfig, segment_by_frame: bool, impl: str):
        super().__init__()
        self.config, self.segment_by_frame, self.impl = config, segment_by_frame, impl
        self.pixel_norm = PixelNorm()
        # A convolution with stride = kernel is a product: [C, 3 * 14 * 14]
        self.patch_embedding = Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        self.position_embedding = embedding(config.table_side**2, config.hidden_size)
        self.layers = nn.ModuleList(VisionLayer(config, impl) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def geometry(self, grid_thw: Tensor, num_patches: int) -> VisionBatch:
        """The geometry of `grid_thw` [n, 3] on the tower's device, in block order."""
        return VisionBatch.build(
            grid_thw,
            num_patches,
            table_side=self.config.table_side,
            merge_size=self.config.spatial_merge_size,
            segment_by_frame=self.segment_by_frame,
            device=self.patch_embedding.weight.device,
        )

    def embed(self, pixel_values: Tensor, batch: VisionBatch) -> Tensor:
        """[T, 3, 14, 14] patches in raster order to [T, C] with learned positions, in the order of `batch`.

        uint8 patches are grey levels: their normalisation is folded into the embedding's weights.
        """
        weight, bias = self.patch_embedding.weight, self.patch_embedding.bias
        if pixel_values.dtype == torch.uint8:
            weight, bias = self._fold_normalisation()
            # Around 128 the grey levels are exact in every dtype, and the sums stay small
            pixel_values = pixel_values.to(weight.dtype) - PIXEL_ORIGIN
        patches = pixel_values.flatten(1).to(weight.dtype)[batch.raster_index]
        x = linear(patches, weight, bias)
        return ops.position_embedding_2d(
            x, self.position_embedding.weight, batch, impl=impl_outside_attention(self.impl)
        )

    def _fold_normalisation(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the embedding for `pixel - PIXEL_ORIGIN`: w·((p·rescale - mean)/std) + b, written for p."""
        norm = self.pixel_norm
        weight, bias = self.patch_embedding.weight, self.patch_embedding.bias
        mean, std = (
            torch.tensor(x, device=weight.device).repeat_interleave(self.config.patch_size**2) for x in norm[:2]
        )
        shift = (PIXEL_ORIGIN * norm.rescale_factor - mean) / std
        folded = weight.float() * (norm.rescale_factor / std)
        return folded.to(weight.dtype), (bias.float() + weight.float() @ shift).to(bias.dtype)

    def forward(self, pixel_values: Tensor, batch: VisionBatch) -> Tensor:
        """Features [T, C] after the last norm, in the order of `batch`."""
        inv_freq = inverse_frequencies(self.config.rope_theta, self.config.head_dim // 4, pixel_values.device)
        x = self.embed(pixel_values, batch)
        for layer in self.layers:
            x = layer(x, batch, inv_freq)
        return self.post_layernorm(x)
