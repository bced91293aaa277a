"""The text model, with one parameter per tensor of the checkpoint. Symbols: B sequences, S tokens per sequence, D head dim."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from keye_kernels import ops
from keye_kernels.model import fused
from keye_kernels.model.checks import has_inner_padding
from keye_kernels.model.decoder import prompt_segments
from keye_kernels.model.positions import inverse_frequencies
from keye_kernels.plain import calls_forward, is_plain

from .attention import NAME, eager_attention
from .config import KeyeConfig
from .pretrained import KeyePreTrainedModel

# transformers 4 takes the positions of the new tokens in the cache as an argument
MASK_TAKES_CACHE_POSITION = "cache_position" in inspect.signature(create_causal_mask).parameters


class TextAttention(nn.Module):
    """Causal attention with grouped heads. q and k are normalized per head before rope."""

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
        """Maps [B, S, hidden], with `position_ids` [3, B·S], to [B, S, hidden] and the attention weights, or None."""
        shape = x.shape[:2]
        q, k, v = (proj(x).flatten(0, 1).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        norms = {}
        if is_plain(self.q_norm, self.k_norm):
            norms = {"q_norm_weight": self.q_norm.weight, "k_norm_weight": self.k_norm.weight, "eps": self.q_norm.eps}
        else:
            q, k = self.q_norm(q), self.k_norm(k)
        section = self.config.rope_parameters["mrope_section"]
        q, k = ops.rope_3d(q, k, position_ids, inv_freq, section, **norms)
        q, k, v = (t.unflatten(0, shape).transpose(1, 2) for t in (q, k, v))  # [B, heads, S, D]
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx, {"cache_position": kwargs.get("cache_position")})
        name = self.config._attn_implementation
        attend = eager_attention if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        out, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.o_proj(out.reshape(*shape, -1)), weights


class TextMLP(nn.Module):
    def __init__(self, config: KeyeConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        """The input of `down_proj`."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        # `fused.silu_mul` may overwrite the gate, which a hook could keep
        return fused.silu_mul(gate, up) if is_plain(self.gate_proj) else F.silu(gate) * up


class TextLayer(GradientCheckpointingLayer):
    def __init__(self, config: KeyeConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = TextAttention(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = TextMLP(config)

    def forward(self, x: Tensor, **batch: Any) -> tuple[Tensor, Tensor | None]:
        impl = fused.impl_for_layer(self)
        attended, weights = self.self_attn(fused.norm(x, self.input_layernorm, impl), **batch)
        x, normed = fused.add_norm(attended, x, self.post_attention_layernorm, impl)
        # A hook could keep the sum, to which `add_linear` may add in place
        if type(self.mlp) is TextMLP and calls_forward(self.mlp) and calls_forward(self.post_attention_layernorm):
            return fused.add_linear(self.mlp.hidden(normed), x, self.mlp.down_proj, impl), weights
        return x + self.mlp(normed), weights


class KeyeTextModel(KeyePreTrainedModel):
    """The decoder. Must agree with `Qwen3Model` with 3D rope.

    See `docs/models/keye_vl_1_5.md`, "3D position ids" and "Text model".
    """

    def __init__(self, config: KeyeConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TextLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Maps `inputs_embeds` [B, S, hidden], with `position_ids` [3, B, S], to [B, S, hidden] after the final norm.

        `attention_mask` is [B, cached and new tokens], 0 = padding, or a mask prepared by `generate`. The new keys and values are
        added to `past_key_values`. `kwargs` are passed to the attention implementation.
        """
        (batch_size, length), device = inputs_embeds.shape[:2], inputs_embeds.device
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        cache_position = ()
        if MASK_TAKES_CACHE_POSITION:
            if kwargs.get("cache_position") is None:
                kwargs["cache_position"] = torch.arange(past, past + length, device=device)
            cache_position = (kwargs["cache_position"],)
        if self.config._attn_implementation == NAME and past == 0 and _is_contiguous(attention_mask):
            kwargs |= {"cu_seq_lens_q": prompt_segments(attention_mask).cu_seqlens, "max_length_q": length}
        rope_theta = self.config.rope_parameters["rope_theta"]
        batch = {
            "attention_mask": create_causal_mask(self.config, inputs_embeds, attention_mask, *cache_position, past_key_values),
            "position_ids": position_ids.expand(3, batch_size, -1).flatten(1),
            "inv_freq": inverse_frequencies(rope_theta, self.config.head_dim // 2, device),
            "past_key_values": past_key_values,
        }
        output_hidden_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        x, states, attentions = inputs_embeds, [], []
        for layer in self.layers:
            if output_hidden_states:
                states.append(x)
            x, weights = layer(x, **batch, **kwargs)
            if output_attentions:
                attentions.append(weights)
        x = fused.norm(x, self.norm)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*states, x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


def _is_contiguous(attention_mask: Any) -> bool:
    """Whether this is a mask [B, S] without padding between tokens. Reads its values, once per prompt."""
    return isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 and not has_inner_padding(attention_mask).any()
