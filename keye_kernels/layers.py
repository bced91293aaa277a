"""Layers without a constructor, for the mappings of the Hub's `kernels` package.

A module keeps its weights and gets the layer's `forward`.
`kernels` asks of a layer that it has no `__init__`, no members of its own but `has_backward` and `can_torch_compile`, and the
parameters of the `forward` that it takes the place of. Each layer here names the attributes that it reads from such a module.
T tokens or patches, H heads, D head dim, C channels. Example: examples/hub_layers.py.
"""

import torch
from torch import Tensor, nn

from keye_kernels import ops

__all__ = [
    "KeyeProjector",
    "KeyeRope2D",
    "KeyeRope3D",
    "KeyeVarlenAttention",
    "Qwen2VLPatchMerger",
    "Qwen3VLPatchMerger",
]


class KeyeRope2D(nn.Module):
    """`ops.rope_2d` for a module without weights: q, k [T, H, D], position_ids [2, T], inv_freq [D/4]."""

    has_backward = True
    can_torch_compile = True

    def forward(self, q: Tensor, k: Tensor, position_ids: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
        return ops.rope_2d(q, k, position_ids, inv_freq)


class KeyeRope3D(nn.Module):
    """`ops.rope_3d` for a module without weights: q, k [T, H, D], position_ids [3, T], inv_freq [D/2]."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self, q: Tensor, k: Tensor, position_ids: Tensor, inv_freq: Tensor, mrope_section: list[int]
    ) -> tuple[Tensor, Tensor]:
        return ops.rope_3d(q, k, position_ids, inv_freq, mrope_section)


class KeyeVarlenAttention(nn.Module):
    """`ops.varlen_attention` for a module without weights: q, k, v [T, H, D], cu_seqlens [S+1] int32; not causal."""

    has_backward = True
    can_torch_compile = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        return ops.varlen_attention(q, k, v, cu_seqlens, max_seqlen)


class KeyeProjector(nn.Module):
    """The projector of Keye-VL and PaddleOCR-VL: all pictures in one call. Reads `pre_norm`, `linear_1`, `linear_2`.

    image_features [T, C] in raster order, image_grid_thw [n, 3] -> [T/4, out]. The grids are read on the host, which a compiled
    graph cannot hold.
    """

    has_backward = True
    can_torch_compile = False

    def forward(self, image_features: Tensor, image_grid_thw: Tensor) -> Tensor:
        weights = [p for layer in (self.pre_norm, self.linear_1, self.linear_2) for p in (layer.weight, layer.bias)]
        return ops.patch_merge_projection(image_features, image_grid_thw, *weights, eps=self.pre_norm.eps)


class Qwen2VLPatchMerger(nn.Module):
    """Qwen2-VL's `PatchMerger`: x [T, C], the patches of a block side by side, -> [T/4, out]. Reads `ln_q`, `mlp`."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        return _project_neighbours(x, self.ln_q, self.mlp[0], self.mlp[2])


class Qwen3VLPatchMerger(nn.Module):
    """Qwen3-VL's `Qwen3VLVisionPatchMerger`, normalising before or after the merge. Reads `norm`, `linear_fc1`, `linear_fc2`."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        return _project_neighbours(x, self.norm, self.linear_fc1, self.linear_fc2)


def _project_neighbours(x: Tensor, norm: nn.LayerNorm, linear_1: nn.Linear, linear_2: nn.Linear) -> Tensor:
    """The projector on [T, C] features whose m x m patches to merge stand side by side, so that no index is needed."""
    merge_size = round((linear_1.in_features / x.shape[-1]) ** 0.5)
    weights = [p for layer in (norm, linear_1, linear_2) for p in (layer.weight, layer.bias)]
    # The public function wants grids; the registered operator also takes features that are in block order already
    return torch.ops.keye_kernels.patch_merge_projection(x, None, *weights, merge_size, norm.eps, "auto")
