"""Layers with one parameter for each tensor of the checkpoint, as LoRA, tensor parallelism and `save_pretrained` want them.

The work is done by the operators and by the lean model's modules. Symbols: B rows, S tokens of a row, T patches or tokens.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from keye_kernels import ops
from keye_kernels.geometry import VisionBatch
from keye_kernels.integrations.plain import is_plain
from keye_kernels.model import projector, vision

from .attention import VISION_IMPLEMENTATIONS, eager_attention
from .config import KeyeConfig, KeyeVisionConfig


class PatchEmbedding(nn.Conv2d):
    """A convolution whose kernel covers the whole patch is a product: [T, 3, 14, 14] to [T, C, 1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.flatten(1), self.weight.flatten(1), self.bias)[..., None, None]


class VisionAttention(nn.Module):
    """As the lean tower's, with three projections instead of one."""

    def __init__(self, config: KeyeVisionConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, batch: VisionBatch, inv_freq: Tensor) -> Tensor:
        # Under tensor parallelism a rank has some of the heads
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = ops.rope_2d(q, k, batch.position_ids, inv_freq)
        impl = VISION_IMPLEMENTATIONS.get(self.config._attn_implementation, "auto")
        out = ops.varlen_attention(q, k, v, batch.cu_seqlens, batch.max_seqlen, impl=impl)
        return self.out_proj(out.flatten(1))


class VisionLayer(GradientCheckpointingLayer):
    def __init__(self, config: KeyeVisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = vision.VisionMLP(config)

    def forward(self, x: Tensor, batch: VisionBatch, inv_freq: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), batch, inv_freq)
        return x + self.mlp(self.layer_norm2(x))


class Projector(projector.Projector):
    """The lean projector, which reads its layers' weights; layers that are more than weights are called instead."""

    def forward(self, features: Tensor, batch: VisionBatch) -> Tensor:
        """[T, C] in block order to [T/4, hidden]."""
        if is_plain(self.pre_norm, self.linear_1, self.linear_2):
            return super().forward(features, batch)
        x = self.pre_norm(features.view(-1, *self.pre_norm.normalized_shape))
        return self.linear_2(F.gelu(self.linear_1(x.view(-1, self.merge_size**2 * features.shape[1]))))


class TextAttention(nn.Module):
    """Causal attention with grouped heads; q and k are normalised by head before they turn."""

    is_causal = True

    def __init__(self, config: KeyeConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        inv_freq: Tensor,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, S, hidden], `position_ids` [3, B·S], to [B, S, hidden] and the weights, where the implementation has them."""
        rows = x.shape[:2]
        q, k, v = (
            proj(x).flatten(0, 1).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        norms = {}
        if is_plain(self.q_norm, self.k_norm):
            norms = {"q_norm_weight": self.q_norm.weight, "k_norm_weight": self.k_norm.weight, "eps": self.q_norm.eps}
        else:
            q, k = self.q_norm(q), self.k_norm(k)
        section = self.config.rope_parameters["mrope_section"]
        q, k = ops.rope_3d(q, k, position_ids, inv_freq, section, **norms)
        q, k, v = (t.unflatten(0, rows).transpose(1, 2) for t in (q, k, v))  # [B, heads, S, D]
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx, {"cache_position": kwargs.get("cache_position")})
        name = self.config._attn_implementation
        attend = eager_attention if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        out, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.o_proj(out.reshape(*rows, -1)), weights


class TextMLP(nn.Module):
    def __init__(self, config: KeyeConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TextLayer(GradientCheckpointingLayer):
    def __init__(self, config: KeyeConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = TextAttention(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = TextMLP(config)

    def forward(self, x: Tensor, **batch: Any) -> tuple[Tensor, Tensor | None]:
        attended, weights = self.self_attn(self.input_layernorm(x), **batch)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), weights
