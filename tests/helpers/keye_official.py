"""A small rewrite of Keye's own `modeling_keye.py` with its class, attribute and argument names and its order of operations.

Where the original calls flash-attn, this file uses torch.
"""

from itertools import pairwise
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

TEXT = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_hidden_layers=2)
VISION = dict(hidden_size=144, num_attention_heads=2, num_hidden_layers=2, intermediate_size=96, patch_size=4)


def official_config() -> SimpleNamespace:
    vision = SimpleNamespace(**VISION, attention_dropout=0.0, layer_norm_eps=1e-6, num_positions=16)
    rope_scaling = {"type": "default", "mrope_section": [2, 3, 3]}
    return SimpleNamespace(**TEXT, vision_config=vision, rope_scaling=rope_scaling, rope_theta=1e6, vocab_size=120)


def rotate_half(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_pos_emb_flashatt(q, k, cos, sin):
    cos, sin = cos[:, None].float(), sin[:, None].float()
    q, k = ((x.float() * cos + rotate_half(x.float()) * sin).type_as(x) for x in (q, k))
    return q, k


def flash_attn_varlen(q, k, v, cu_seqlens, scale):
    segments = []
    for start, end in pairwise(cu_seqlens.tolist()):
        parts = (x[start:end].transpose(0, 1) for x in (q, k, v))
        segments.append(F.scaled_dot_product_attention(*parts, scale=scale).transpose(0, 1))
    return torch.cat(segments)


class SigLIPRotaryEmbedding(nn.Module):
    def __init__(self, dim, theta=10000.0):
        super().__init__()
        inv_freq = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, seqlen):
        seq = torch.arange(seqlen, device=self.inv_freq.device, dtype=self.inv_freq.dtype)
        return torch.outer(seq, self.inv_freq)


class SiglipAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.embed_dim = config, config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = self.embed_dim // self.num_heads
        self.scale, self.dropout = self.head_dim**-0.5, config.attention_dropout
        self.k_proj = nn.Linear(self.embed_dim, self.embed_dim)
        self.v_proj = nn.Linear(self.embed_dim, self.embed_dim)
        self.q_proj = nn.Linear(self.embed_dim, self.embed_dim)
        self.out_proj = nn.Linear(self.embed_dim, self.embed_dim)

    def forward(self, hidden_states, attention_mask=None, output_attentions=False, cu_seqlens=None, rope_emb=None):
        batch_size, length, _ = hidden_states.shape
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(hidden_states).view(batch_size, length, self.num_heads, self.head_dim) for p in projections)
        if rope_emb is not None:
            cos, sin = rope_emb
            q, k = apply_rotary_pos_emb_flashatt(q, k, cos, sin)
        if output_attentions:
            weights = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * self.scale).softmax(-1)
            attended = (weights @ v.transpose(1, 2)).transpose(1, 2).flatten(2)
            return self.out_proj(attended), weights
        attended = flash_attn_varlen(q[0], k[0], v[0], cu_seqlens, self.scale)
        return self.out_proj(attended.flatten(-2)[None]), None


class SiglipMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation_fn = nn.GELU(approximate="tanh")

    def forward(self, hidden_states):
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class SiglipEncoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SiglipAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SiglipMLP(config)

    def forward(self, hidden_states, attention_mask, output_attentions=False, cu_seqlens=None, rope_emb=None):
        attended, weights = self.self_attn(
            hidden_states=self.layer_norm1(hidden_states),
            attention_mask=attention_mask,
            output_attentions=output_attentions,
            cu_seqlens=cu_seqlens,
            rope_emb=rope_emb,
        )
        hidden_states = hidden_states + attended
        hidden_states = hidden_states + self.mlp(self.layer_norm2(hidden_states))
        return (hidden_states, weights) if output_attentions else (hidden_states,)


class SiglipEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList([SiglipEncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.rotary_pos_emb = SigLIPRotaryEmbedding(config.hidden_size // config.num_attention_heads // 2)

    @staticmethod
    def flatten_list(image_grid_thw):
        flat = []
        for image_grid in image_grid_thw:
            flat.extend(image_grid) if isinstance(image_grid, list) else flat.append(image_grid)
        return flat

    def forward(
        self,
        inputs_embeds,
        attention_mask=None,
        output_attentions=None,
        cu_seqlens=None,
        image_grid_thw=None,
        height_position_ids=None,
        width_position_ids=None,
        use_rope=False,
        window_size=-1,
    ):
        rope_emb, hidden_states = None, inputs_embeds
        if use_rope:
            if width_position_ids is None or height_position_ids is None:
                rows, columns = [], []
                for t, h, w in self.flatten_list(image_grid_thw):
                    image_pids = torch.arange(t * h * w) % (h * w)
                    rows.append(image_pids // w)
                    columns.append(image_pids % w)
                height_position_ids, width_position_ids = torch.cat(rows), torch.cat(columns)
            pids = torch.stack([height_position_ids, width_position_ids], dim=-1)
            rope_emb_max_grid = self.rotary_pos_emb(pids.max() + 1)
            rope_emb = rope_emb_max_grid[pids].flatten(1).repeat(1, 2)
            rope_emb = (rope_emb.cos(), rope_emb.sin())
        attentions = ()
        for encoder_layer in self.layers:
            outputs = encoder_layer(hidden_states, attention_mask, output_attentions, cu_seqlens=cu_seqlens, rope_emb=rope_emb)
            hidden_states = outputs[0]
            attentions += outputs[1:]
        return hidden_states, attentions


class SiglipVisionEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.position_embedding = nn.Embedding(config.num_positions, config.hidden_size)

    def forward(self, pixel_values, image_grid_thw):
        x = self.patch_embedding(pixel_values[0]).flatten(-2).squeeze(-1)
        table = self.position_embedding.weight
        side = int(table.shape[0] ** 0.5)
        table = table.view(1, side, side, -1).permute(0, 3, 1, 2)
        resized = []
        for t, h, w in image_grid_thw:
            positions = F.interpolate(table, size=(h, w), mode="bilinear", align_corners=False)
            resized.append(positions[0].flatten(1).T.repeat(t, 1))
        return (x + torch.cat(resized))[None]


class SiglipVisionTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embeddings = SiglipVisionEmbeddings(config)
        self.encoder = SiglipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = SiglipMultiheadAttentionPoolingHead(config)

    def forward(self, pixel_values, image_grid_thw, cu_seqlens, **encoder_options):
        hidden_states, _ = self.encoder(
            inputs_embeds=self.embeddings(pixel_values, image_grid_thw),
            cu_seqlens=cu_seqlens,
            image_grid_thw=image_grid_thw,
            use_rope=True,
            **encoder_options,
        )
        lengths = [t * h * w for t, h, w in image_grid_thw]
        return list(self.post_layernorm(hidden_states)[0].split(lengths))


class SiglipMultiheadAttentionPoolingHead(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = nn.MultiheadAttention(config.hidden_size, config.num_attention_heads, batch_first=True)


class SiglipVisionModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.vision_model = SiglipVisionTransformer(config)

    def forward(self, pixel_values, **kwargs):
        return self.vision_model(pixel_values=pixel_values, **kwargs)


class Projector(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.vision_config.hidden_size
        self.merge_kernel_size = (2, 2)
        self.hidden_size = 4 * width
        self.pre_norm = nn.LayerNorm(width, eps=1e-5)
        self.linear_1 = nn.Linear(self.hidden_size, self.hidden_size)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(self.hidden_size, config.hidden_size)

    def forward(self, image_features, image_grid_thw):
        if isinstance(image_features, (list, tuple)):
            processed = []
            for image_feature, (t, h, w) in zip(image_features, image_grid_thw, strict=True):
                x = self.pre_norm(image_feature).view(t, h // 2, 2, w // 2, 2, -1)
                x = x.permute(0, 1, 3, 2, 4, 5).reshape(t * h * w // 4, self.hidden_size)
                processed.append(self.linear_2(self.act(self.linear_1(x))))
            return processed
        x = self.pre_norm(image_features).view(-1, self.hidden_size)
        return self.linear_2(self.act(self.linear_1(x)))


class KeyeRotaryEmbedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.rope_type, self.attention_scaling = config, "default", 1.0
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        self.register_buffer("inv_freq", config.rope_theta**-exponent, persistent=False)

    @torch.no_grad()
    def forward(self, x, position_ids):
        freqs = position_ids[..., None].float() * self.inv_freq.float()
        emb = torch.cat((freqs, freqs), dim=-1)  # [3, B, S, D]
        return emb.cos().to(x.dtype), emb.sin().to(x.dtype)


def apply_multimodal_rotary_pos_emb(q, k, cos, sin, mrope_section, unsqueeze_dim=1):
    cos, sin = (
        torch.cat([m[i % 3] for i, m in enumerate(x.split(mrope_section * 2, dim=-1))], dim=-1).unsqueeze(unsqueeze_dim)
        for x in (cos, sin)
    )
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


class Qwen3RMSNorm(nn.RMSNorm):
    pass


class KeyeAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx, self.head_dim, self.rope_scaling = layer_idx, config.head_dim, config.rope_scaling
        heads, kv_heads = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, heads, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads, bias=False)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=False)
        self.q_norm = Qwen3RMSNorm(config.head_dim, eps=1e-6)
        self.k_norm = Qwen3RMSNorm(config.head_dim, eps=1e-6)
        self.rotary_emb = KeyeRotaryEmbedding(config)

    def forward(self, hidden_states, attention_mask=None, past_key_value=None, position_embeddings=None):
        batch_size, length, _ = hidden_states.shape
        shape = (batch_size, length, -1, self.head_dim)
        q = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        cos, sin = position_embeddings
        q, k = apply_multimodal_rotary_pos_emb(q, k, cos, sin, self.rope_scaling["mrope_section"])
        if past_key_value is not None:
            k, v = past_key_value.update(k, v, self.layer_idx)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None, past_key_value


class KeyeDecoderLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = KeyeAttention(config, layer_idx)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=1e-6)

    def forward(self, hidden_states, attention_mask, past_key_value, position_embeddings):
        attended, _, _ = self.self_attn(self.input_layernorm(hidden_states), attention_mask, past_key_value, position_embeddings)
        return hidden_states + attended


class Qwen3Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([KeyeDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=1e-6)
        self.rotary_emb = KeyeRotaryEmbedding(config)

    def forward(self, inputs_embeds, position_ids, attention_mask, past_key_values=None):
        length = inputs_embeds.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        # Padding tokens attend to themselves: the softmax of a fully masked row is NaN
        mask = (causal & attention_mask.bool()[:, None]) | torch.eye(length, dtype=torch.bool)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        x = inputs_embeds
        for layer in self.layers:
            x = layer(x, mask[:, None], past_key_values, position_embeddings)
        return self.norm(x)


class KeyeForConditionalGeneration(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.visual = SiglipVisionModel(config.vision_config)
        self.mlp_AR = Projector(config)
        self.model = Qwen3Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids, attention_mask, position_ids, pixel_values, image_grid_thw, **kwargs):
        grids = [tuple(grid) for grid in image_grid_thw.tolist()]
        cu_seqlens = F.pad(image_grid_thw.prod(1).cumsum(0), (1, 0)).to(torch.int32)
        features = self.visual(pixel_values[None], image_grid_thw=grids, cu_seqlens=cu_seqlens)
        tokens = torch.cat(self.mlp_AR(features, grids))
        embeds = self.model.embed_tokens(input_ids)
        embeds = embeds.masked_scatter((input_ids == 115)[..., None], tokens)
        return SimpleNamespace(logits=self.lm_head(self.model(embeds, position_ids, attention_mask, **kwargs)))
