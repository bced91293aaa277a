"""Layers for the Hub's `kernels` package, which replaces the `forward` of a module and keeps its weights.

`kernels` requires that a layer has no `__init__`, no members other than `has_backward` and `can_torch_compile`, and a `forward`
with the parameters of the one it replaces. The docstring of each layer names the attributes that it reads from the module.
Example: examples/hub_layers.py. Symbols: T tokens or patches, H heads, D head dim, C channels, S segments, n images.
"""

import torch
from torch import Tensor, nn

from keye_kernels import ops

__all__ = ["KeyeProjector", "KeyeRope2D", "KeyeRope3D", "KeyeVarlenAttention", "Qwen2VLPatchMerger", "Qwen3VLPatchMerger"]


class KeyeRope2D(nn.Module):
    """`ops.rope_2d`, for a module without weights."""

    has_backward = can_torch_compile = True

    def forward(self, q: Tensor, k: Tensor, position_ids: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
        """Rotates q and k [T, H, D] at position_ids [2, T] (row, column), with frequencies inv_freq [D/4]."""
        return ops.rope_2d(q, k, position_ids, inv_freq)


class KeyeRope3D(nn.Module):
    """`ops.rope_3d`, for a module without weights."""

    has_backward = can_torch_compile = True

    def forward(
        self, q: Tensor, k: Tensor, position_ids: Tensor, inv_freq: Tensor, mrope_section: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Rotates q and k [T, H, D] at position_ids [3, T] (time, height, width), with frequencies inv_freq [D/2]."""
        return ops.rope_3d(q, k, position_ids, inv_freq, mrope_section)


class KeyeVarlenAttention(nn.Module):
    """`ops.varlen_attention` without a causal mask, for a module without weights."""

    has_backward = can_torch_compile = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Attention of q, k, v [T, H, D] within the segments cu_seqlens [S+1] int32; returns [T, H, D]."""
        return ops.varlen_attention(q, k, v, cu_seqlens, max_seqlen)


class KeyeProjector(nn.Module):
    """The projector of Keye-VL and PaddleOCR-VL, one call for all images. Reads `pre_norm`, `linear_1` and `linear_2`.

    Cannot be compiled: it reads the values of the grids on the CPU.
    """

    has_backward = True
    can_torch_compile = False

    def forward(self, image_features: Tensor, image_grid_thw: Tensor) -> Tensor:
        """Projects features [T, C] in raster order, with grids [n, 3], to [T/4, out]."""
        weights = [p for layer in (self.pre_norm, self.linear_1, self.linear_2) for p in (layer.weight, layer.bias)]
        return ops.patch_merge_projection(image_features, image_grid_thw, *weights, eps=self.pre_norm.eps)


class Qwen2VLPatchMerger(nn.Module):
    """Qwen2-VL's `PatchMerger`. Reads `ln_q` and `mlp`."""

    has_backward = can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        """Projects features x [T, C] in block order to [T/4, out]."""
        return _project_block_order(x, self.ln_q, self.mlp[0], self.mlp[2])


class Qwen3VLPatchMerger(nn.Module):
    """Qwen3-VL's `Qwen3VLVisionPatchMerger`, norm before or after the merge. Reads `norm`, `linear_fc1` and `linear_fc2`."""

    has_backward = can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        """Projects features x [T, C] in block order to [T/4, out]."""
        return _project_block_order(x, self.norm, self.linear_fc1, self.linear_fc2)


def _project_block_order(x: Tensor, norm: nn.LayerNorm, linear_1: nn.Linear, linear_2: nn.Linear) -> Tensor:
    """The projector on [T, C] features in block order: the m x m patches that are merged are consecutive."""
    merge_size = round((linear_1.in_features / x.shape[-1]) ** 0.5)
    weights = [p for layer in (norm, linear_1, linear_2) for p in (layer.weight, layer.bias)]
    # The public function needs grids; the registered operator takes None for features in block order
    return torch.ops.keye_kernels.patch_merge_projection(x, None, *weights, merge_size, norm.eps, "auto")
