"""The text model: Qwen3's decoder with 3D rope. Symbols: B rows, S tokens of a row, T = B·S, M slots of the cache."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keye_kernels import ops
from keye_kernels.ops.implementation import impl_outside_attention

from .cache import KVCache
from .config import KeyeConfig
from .linear import FusedLinear, Linear, embedding
from .positions import inverse_frequencies

APART = 256  # tokens from which on gate and up are products of their own


@dataclass
class TextBatch:
    """What every layer needs to know of a batch of tokens.

    A prompt attends within the segments of its rows (`cu_seqlens` [3B+1]: left padding, tokens, right padding of each row),
    later tokens attend to the cache through `cache_mask` [B, 1, S, M]. The other one of the two is None.
    """

    batch_size: int
    position_ids: Tensor  # [3, T]
    inv_freq: Tensor  # [D/2] float32
    slots: Tensor  # [S] places in the cache
    cu_seqlens: Tensor | None
    cache_mask: Tensor | None


def prompt_segments(attention_mask: Tensor) -> Tensor:
    """[3B+1] int32 `cu_seqlens` of rows [B, S] whose tokens stand together: padding attends to padding only."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        # Tensors made in inference mode count no versions: every layer would read the offsets again, and wait for them
        with torch.inference_mode(False):
            return prompt_segments(attention_mask)
    length = attention_mask.shape[1]
    count = attention_mask.sum(1)
    # A row of padding only is one segment: argmax of zeros is 0
    left = attention_mask.int().argmax(1)
    row = torch.arange(attention_mask.shape[0], device=attention_mask.device) * length
    ends = torch.stack((row + left, row + left + count, row + length), dim=1).flatten()
    return F.pad(ends, (1, 0)).to(torch.int32)


def cache_mask(cache: KVCache, slots: Tensor, attention_mask: Tensor) -> Tensor:
    """[B, 1, S, M]: which slots each new token attends to; `attention_mask` [B, S] is that of the new tokens."""
    valid = cache.valid.index_copy(1, slots, attention_mask.bool())
    causal = torch.arange(cache.max_length, device=slots.device) <= slots[:, None]  # [S, M]
    return (valid[:, None] & causal)[:, None]


class TextAttention(nn.Module):
    """Causal attention with grouped heads; q and k are normalised by head before they turn."""

    def __init__(self, config: KeyeConfig, layer: int, impl: str):
        super().__init__()
        self.layer, self.impl, self.head_dim, self.eps = layer, impl, config.head_dim, config.rms_norm_eps
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.mrope_section = list(config.mrope_section)
        sizes = [heads * config.head_dim for heads in (self.heads, self.kv_heads, self.kv_heads)]
        self.qkv_proj = FusedLinear(config.hidden_size, sizes, bias=False)
        self.o_proj = Linear(sizes[0], config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, batch: TextBatch, cache: KVCache | None) -> Tensor:
        """[T, hidden] to [T, hidden]."""
        q, k, v = (t.view(x.shape[0], -1, self.head_dim) for t in self.qkv_proj(x))
        norms = {"q_norm_weight": self.q_norm.weight, "k_norm_weight": self.k_norm.weight, "eps": self.eps}
        impl = impl_outside_attention(self.impl)
        q, k = ops.rope_3d(q, k, batch.position_ids, batch.inv_freq, self.mrope_section, **norms, impl=impl)
        if cache is not None:
            rows = (batch.batch_size, -1)
            cache.write(self.layer, batch.slots, k.unflatten(0, rows), v.unflatten(0, rows))
        if batch.cache_mask is None:
            length = x.shape[0] // batch.batch_size
            out = ops.varlen_attention(q, k, v, batch.cu_seqlens, length, causal=True, impl=self.impl)
        else:
            out = self._attend_to_cache(q, batch, cache)
        return self.o_proj(out.flatten(1))

    def _attend_to_cache(self, q: Tensor, batch: TextBatch, cache: KVCache) -> Tensor:
        # The query heads of a group stand as further rows of one head, so that keys are read once and never repeated
        group = self.heads // self.kv_heads
        q = q.view(batch.batch_size, -1, self.kv_heads, group, self.head_dim).permute(0, 2, 3, 1, 4)  # [B, Hk, G, S, D]
        key, value = (x[self.layer].transpose(1, 2) for x in (cache.keys, cache.values))  # [B, Hk, M, D]
        mask = batch.cache_mask.repeat(1, 1, group, 1)  # [B, 1, G·S, M]
        out = F.scaled_dot_product_attention(q.flatten(2, 3), key, value, attn_mask=mask)
        return out.unflatten(2, (group, -1)).permute(0, 3, 1, 2, 4).reshape(-1, self.heads, self.head_dim)


class TextMLP(nn.Module):
    def __init__(self, config: KeyeConfig):
        super().__init__()
        self.gate_up_proj = FusedLinear(config.hidden_size, [config.intermediate_size] * 2, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # Elementwise work on views of one product takes a GPU twice as long; a few rows rather save a launch. A compiler fuses it
        wide = not torch.compiler.is_compiling() and x.shape[0] >= APART
        gate, up = self.gate_up_proj(x, apart=wide)
        # Nothing is as wide: unless a gradient needs it, it is there once in place of twice
        hidden = F.silu(gate, inplace=not torch.is_grad_enabled()).mul_(up)
        del gate, up
        return self.down_proj(hidden)


class TextLayer(nn.Module):
    def __init__(self, config: KeyeConfig, layer: int, impl: str):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = TextAttention(config, layer, impl)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = TextMLP(config)

    def forward(self, x: Tensor, batch: TextBatch, cache: KVCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), batch, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Must agree with `Qwen3Model` under the official code's 3D rope (specification of 1.5, sections 7 and 8)."""

    def __init__(self, config: KeyeConfig, impl: str):
        super().__init__()
        self.config = config
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TextLayer(config, i, impl) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, embeds: Tensor, position_ids: Tensor, attention_mask: Tensor, cache: KVCache | None) -> Tensor:
        """[B, S, hidden] embeddings at positions [3, B, S] to hidden states; `attention_mask` [B, S] is that of these tokens."""
        rows, length = embeds.shape[:2]
        fresh = cache is None or cache.is_empty
        slots = torch.arange(length, device=embeds.device) if cache is None else cache.slots(length)
        batch = TextBatch(
            batch_size=rows,
            position_ids=position_ids.flatten(1),
            inv_freq=inverse_frequencies(self.config.rope_theta, self.config.head_dim // 2, embeds.device),
            slots=slots,
            cu_seqlens=prompt_segments(attention_mask) if fresh else None,
            cache_mask=None if fresh else cache_mask(cache, slots, attention_mask),
        )
        x = embeds.flatten(0, 1)
        for layer in self.layers:
            x = layer(x, batch, cache)
        if cache is not None:
            cache.advance(slots, attention_mask)
        return self.norm(x).unflatten(0, (rows, length))
