"""The text model: Qwen3's decoder with 3D rope.

Symbols: B sequences, S tokens per sequence, T = B·S, D head dim, Hk key heads, M slots of the cache.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keye_kernels import ops
from keye_kernels.ops.implementation import impl_for
from keye_kernels.plain import calls_forward
from keye_kernels.segments import Segments

from . import fused
from .cache import KVCache
from .config import KeyeConfig
from .linear import FusedLinear, Linear, embedding
from .positions import inverse_frequencies
from .prompt_graphs import PromptGraphs

# More new tokens fill the GPU without dividing the keys, and torch's attention takes larger tiles of them
MAX_NEW_TOKENS_OF_KERNEL = 16


@dataclass
class TextBatch:
    """What every layer needs to know of a batch of tokens.

    A prompt attends within its sequences (`segments`: left padding, tokens and right padding of each). Later tokens attend to
    the cache (`segments` is None): through `cache_mask`, or where it is None as well, in `ops.cache_attention`.
    """

    batch_size: int
    position_ids: Tensor  # [3, T]
    inv_freq: Tensor  # [D/2] float32
    slots: Tensor  # [S] indices into the cache
    segments: Segments | None
    cache_mask: Tensor | None  # [B, 1, S, M]


def prompt_segments(attention_mask: Tensor) -> Segments:
    """The 3B segments of a mask [B, S] whose tokens are contiguous in each sequence: padding attends to padding only."""
    length = attention_mask.shape[1]
    count = attention_mask.sum(1)
    # argmax of zeros is 0: a sequence of padding only becomes one segment
    left = attention_mask.int().argmax(1)
    start = torch.arange(attention_mask.shape[0], device=attention_mask.device) * length
    ends = torch.stack((start + left, start + left + count, start + length), dim=1).flatten()
    return Segments(F.pad(ends, (1, 0)).to(torch.int32), length)


def cache_mask(cache: KVCache, slots: Tensor) -> Tensor:
    """[B, 1, S, M]: the slots that each new token attends to."""
    causal = torch.arange(cache.max_length, device=slots.device) <= slots[:, None]  # [S, M]
    return (cache.valid[:, None] & causal)[:, None]


class TextAttention(nn.Module):
    """Causal grouped-query attention; q and k are normalized per head before the rotation."""

    def __init__(self, config: KeyeConfig, layer: int, impl: str):
        super().__init__()
        self.layer, self.impl, self.head_dim = layer, impl, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.mrope_section = list(config.mrope_section)
        sizes = [heads * config.head_dim for heads in (self.heads, self.kv_heads, self.kv_heads)]
        self.qkv_proj = FusedLinear(config.hidden_size, sizes, bias=False)
        self.o_proj = Linear(sizes[0], config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, batch: TextBatch, cache: KVCache | None) -> Tensor:
        """[T, hidden] to [T, hidden]."""
        q, k, v = (t.view(x.shape[0], -1, self.head_dim) for t in fused.split_linear(x, self.qkv_proj, self.impl))
        rotation = batch.position_ids, batch.inv_freq, self.mrope_section
        norms = {"q_norm_weight": self.q_norm.weight, "k_norm_weight": self.k_norm.weight, "eps": self.q_norm.eps}
        if cache is not None and self._writes_with_rope(k, batch, cache):
            caches = cache.keys[self.layer], cache.values[self.layer]
            q = ops.rope_3d_to_cache(q, k, v, *rotation, *caches, batch.slots, **norms, impl="triton")
            # Where a prompt of one sequence is. Views of the cache do not keep the fused projection in memory
            k, v = (x.flatten(0, 1).narrow(0, 0, q.shape[0]) for x in caches)
        else:
            q, k = ops.rope_3d(q, k, *rotation, **norms, impl=impl_for("rope_3d", self.impl))
            if cache is not None:
                cache.write(self.layer, batch.slots, *(x.unflatten(0, (batch.batch_size, -1)) for x in (k, v)))
        if batch.segments is not None:
            impl = impl_for("varlen_attention", self.impl)
            out = ops.varlen_attention(q, k, v, batch.segments, causal=True, impl=impl)
        elif batch.cache_mask is None:
            caches = cache.keys[self.layer], cache.values[self.layer]
            out = ops.cache_attention(q, *caches, cache.valid, batch.slots, impl="triton")
        else:
            out = self._attend_to_cache(q, batch, cache)
        return fused.linear(out.flatten(1), self.o_proj, self.impl)

    def _writes_with_rope(self, k: Tensor, batch: TextBatch, cache: KVCache) -> bool:
        """Whether k and v are needed in the cache only, and one launch can write them."""
        reads_cache = batch.segments is None or batch.batch_size == 1
        return reads_cache and cache.keys[self.layer].dtype == k.dtype and fused.runs_kernels(k, self.impl)

    def _attend_to_cache(self, q: Tensor, batch: TextBatch, cache: KVCache) -> Tensor:
        # The query heads of a group become rows of one head: keys are read once and never repeated
        group = self.heads // self.kv_heads
        q = q.view(batch.batch_size, -1, self.kv_heads, group, self.head_dim).permute(0, 2, 3, 1, 4)  # [B, Hk, G, S, D]
        key, value = (x[self.layer].transpose(1, 2) for x in (cache.keys, cache.values))  # [B, Hk, M, D]
        mask = batch.cache_mask.repeat(1, 1, group, 1)  # [B, 1, G·S, M]
        out = F.scaled_dot_product_attention(q.flatten(2, 3), key, value, attn_mask=mask)
        return out.unflatten(2, (group, -1)).permute(0, 3, 1, 2, 4).reshape(-1, self.heads, self.head_dim)


class TextMLP(nn.Module):
    def __init__(self, config: KeyeConfig, impl: str):
        super().__init__()
        self.impl = impl
        self.gate_up_proj = FusedLinear(config.hidden_size, [config.intermediate_size] * 2, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        """The input of `down_proj`."""
        return fused.linear_silu_mul(x, self.gate_up_proj, self.impl)


class TextLayer(nn.Module):
    def __init__(self, config: KeyeConfig, layer: int, impl: str):
        super().__init__()
        self.impl = impl
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = TextAttention(config, layer, impl)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = TextMLP(config, impl)

    def forward(self, x: Tensor, batch: TextBatch, cache: KVCache | None) -> Tensor:
        # Nested, so that no variable keeps an activation in memory
        attend, norm = self.self_attn, self.post_attention_layernorm
        x, normed = fused.add_norm(attend(fused.norm(x, self.input_layernorm, self.impl), batch, cache), x, norm, self.impl)
        # A hook could keep the sum, to which `add_linear` may add in place
        if calls_forward(self.mlp) and calls_forward(self.post_attention_layernorm):
            return fused.add_linear(self.mlp.hidden(normed), x, self.mlp.down_proj, self.impl)
        return x + self.mlp(normed)


class Decoder(nn.Module):
    """Agrees with `Qwen3Model` under the 3D rope of the official code, see docs/models/keye_vl_1_5.md, "Text model"."""

    def __init__(self, config: KeyeConfig, impl: str):
        super().__init__()
        self.config, self.impl = config, impl
        self.graphs = PromptGraphs()
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TextLayer(config, i, impl) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def _apply(self, *arguments: Any, **options: Any) -> "Decoder":
        self.graphs.clear()  # they keep the parameters that are about to be moved or cast
        return super()._apply(*arguments, **options)

    def forward(self, embeds: Tensor, position_ids: Tensor, attention_mask: Tensor, cache: KVCache | None) -> Tensor:
        """Maps embeddings [B, S, hidden] at positions [3, B, S] to hidden states; `attention_mask` [B, S] masks these tokens."""
        batch_size, length = embeds.shape[:2]
        is_prompt = cache is None or cache.is_empty
        slots = torch.arange(length, device=embeds.device) if cache is None else cache.slots(length)
        if cache is not None:
            cache.mark(slots, attention_mask)
        # runs_kernels comes first: a guard on the length would compile anew for others
        uses_kernel = fused.runs_kernels(embeds, self.impl) and not is_prompt and length <= MAX_NEW_TOKENS_OF_KERNEL
        uses_kernel = uses_kernel and cache.keys[0].dtype == embeds.dtype
        batch = TextBatch(
            batch_size=batch_size,
            position_ids=position_ids.flatten(1),
            inv_freq=inverse_frequencies(self.config.rope_theta, self.config.head_dim // 2, embeds.device),
            slots=slots,
            segments=prompt_segments(attention_mask) if is_prompt else None,
            cache_mask=None if is_prompt or uses_kernel else cache_mask(cache, slots),
        )
        x = embeds.flatten(0, 1)
        for layer in self.layers:
            x = layer(x, batch, cache)
        if cache is not None:
            cache.advance(length)
        return self.norm(x).unflatten(0, (batch_size, length))
