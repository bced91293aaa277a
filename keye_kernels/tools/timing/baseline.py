"""The arithmetic of the official implementation in eager PyTorch. The benchmarks call it "official (eager)".

Like the official code it has:

- separate q, k and v projections,
- cos and sin tables per token; every layer selects the M-RoPE sections again,
- RMSNorm and rope as single operations in float32,
- in the decoder, one causal mask for the whole batch and keys repeated for grouped heads,
- a key/value cache that grows by concatenation,
- position embeddings and patch merging in a loop over images,
- logits of every position.

One difference: in the vision tower the official code calls flash-attn. This code runs eager attention on each segment instead,
because the official eager fallback attends across images and gives other results.

The weights are those of a `kk.Keye`, under the names of the checkpoint. The integer positions of a prompt come from
keye_kernels. Symbols: B sequences, S tokens, T patches, H heads, D head dim.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from keye_kernels.editions import edition_of
from keye_kernels.model import Keye
from keye_kernels.model.checkpoint import destinations
from keye_kernels.model.positions import rope_index

Grid = tuple[int, int, int]
Cache = list[tuple[Tensor, Tensor]]
PROJECTOR_EPS = 1e-5
VISION = "visual.vision_model."


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Same rounding as `Qwen3RMSNorm`: float32 inside, cast back before the multiplication by the weight."""
    normed = x.float()
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def text_tables(position_ids: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [3, B, S, D] of positions [3, B, S], in `dtype`."""
    angle = position_ids[..., None].float() * inv_freq
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate_text(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sections: list[int]) -> tuple[Tensor, Tensor]:
    """Rotates q, k [B, H, S, D]. cos and sin are [3, B, S, D]; each M-RoPE section uses one of the 3 axes."""
    doubled = list(sections) * 2
    cos, sin = (
        torch.cat([part[i % 3] for i, part in enumerate(table.split(doubled, dim=-1))], dim=-1).unsqueeze(1)
        for table in (cos, sin)
    )
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def vision_tables(position_ids: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [T, D] of rows and columns [2, T], gathered from a table of all positions."""
    table = torch.arange(int(position_ids.max()) + 1, device=inv_freq.device)[:, None].float() * inv_freq
    angle = table[position_ids.T].flatten(1).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate_vision(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates q, k [T, H, D] in float32."""
    cos, sin = cos.unsqueeze(1).float(), sin.unsqueeze(1).float()
    return tuple((x.float() * cos + rotate_half(x.float()) * sin).to(x.dtype) for x in (q, k))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of queries [..., H, S, D] over keys and values [..., Hk, M, D], with the scores in memory."""
    groups = query.shape[-3] // key.shape[-3]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=-3), value.repeat_interleave(groups, dim=-3)
    scores = torch.matmul(query, key.transpose(-2, -1)) * scale
    if mask is not None:
        scores = scores + mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value)


def causal_mask(attention_mask: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [B, 1, S, M] for the last S = `length` tokens, from the mask [B, M] of all tokens (0 = padding)."""
    total = attention_mask.shape[1]
    index = torch.arange(total, device=attention_mask.device)
    visible = (index <= index[total - length :, None]) & attention_mask.bool()[:, None]
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min)[:, None]


def attend_segments(q: Tensor, k: Tensor, v: Tensor, offsets: list[int], *, causal: bool = False) -> Tensor:
    """Attention of q, k, v [T, H, D] within each segment, in a loop over segments."""
    outs = []
    for start, end in pairwise(offsets):
        query, key, value = (x[start:end].transpose(0, 1) for x in (q, k, v))
        ones = torch.ones(1, end - start, device=q.device)
        mask = causal_mask(ones, end - start, q.dtype)[0] if causal else None
        outs.append(attend(query, key, value, mask, q.shape[-1] ** -0.5).transpose(0, 1))
    return torch.cat(outs)


def add_positions(features: Tensor, table: Tensor, grids: list[Grid]) -> Tensor:
    """Adds the position embedding to features [T, C], interpolated to the grid of each image."""
    side = round(table.shape[0] ** 0.5)
    square = table.view(side, side, -1).permute(2, 0, 1)[None]
    out, first = [], 0
    for t, h, w in grids:
        resized = F.interpolate(square, size=(h, w), mode="bilinear", align_corners=False)
        resized = resized[0].permute(1, 2, 0).reshape(h * w, -1).repeat(t, 1)
        out.append(features[first : first + t * h * w] + resized)
        first += t * h * w
    return torch.cat(out)


def project(features: Tensor, grids: list[Grid], *weights: Tensor) -> Tensor:
    """Projector: features [T, C] in raster order to [T/4, out], in a loop over images."""
    norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2 = weights
    channels = features.shape[1]
    out, first = [], 0
    for t, h, w in grids:
        x = features[first : first + t * h * w]
        first += t * h * w
        if norm_weight.shape[0] == channels:
            x = F.layer_norm(x, (channels,), norm_weight, norm_bias, PROJECTOR_EPS)
        x = x.view(t, h // 2, 2, w // 2, 2, channels).transpose(2, 3).reshape(-1, 4 * channels)
        if norm_weight.shape[0] != channels:
            x = F.layer_norm(x, (4 * channels,), norm_weight, norm_bias, PROJECTOR_EPS)
        out.append(F.linear(F.gelu(F.linear(x, weight_1, bias_1)), weight_2, bias_2))
    return torch.cat(out)


def grid_positions(grids: list[Grid], device: torch.device) -> Tensor:
    """Row and column [2, T] of every patch in raster order."""
    positions = []
    for t, h, w in grids:
        row, column = torch.arange(h).repeat_interleave(w), torch.arange(w).repeat(h)
        positions.append(torch.stack((row, column)).repeat(1, t))
    return torch.cat(positions, dim=1).to(device)


class Baseline:
    """The whole model. It shares the weights of `model`."""

    def __init__(self, model: Keye):
        self.config = model.config
        self.weights = destinations(model)
        if model.config.tie_word_embeddings:
            self.weights["lm_head.weight"] = self.weights["model.embed_tokens.weight"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def layer_norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, self.config.vision_config.layer_norm_eps)

    def rms_norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, self.weights[f"{name}.weight"], self.config.rms_norm_eps)

    def get_image_features(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """Vision tower and projector: patches [T, 3, 14, 14] in raster order to features [T/4, hidden]."""
        config = self.config.vision_config
        grids = [tuple(row) for row in grid_thw.tolist()]
        if edition_of(self.config.model_type).segment_by_frame:
            grids = [(1, h, w) for t, h, w in grids for _ in range(t)]
        offsets = [0]
        for t, h, w in grids:
            offsets.append(offsets[-1] + t * h * w)
        embeddings = f"{VISION}embeddings."
        weight, bias = (self.weights[f"{embeddings}patch_embedding.{name}"] for name in ("weight", "bias"))
        x = F.conv2d(pixel_values.to(weight.dtype), weight, bias, stride=config.patch_size).flatten(1)
        x = add_positions(x, self.weights[f"{embeddings}position_embedding.weight"], grids)
        pairs = config.head_dim // 4
        inv_freq = config.rope_theta ** -(torch.arange(pairs, device=x.device, dtype=torch.float32) / pairs)
        cos, sin = vision_tables(grid_positions(grids, x.device), inv_freq)
        for index in range(config.num_hidden_layers):
            name = f"{VISION}encoder.layers.{index}"
            h = self.layer_norm(x, f"{name}.layer_norm1")
            q, k, v = (self.linear(h, f"{name}.self_attn.{part}_proj").unflatten(-1, (-1, config.head_dim)) for part in "qkv")
            q, k = rotate_vision(q, k, cos, sin)
            x = x + self.linear(attend_segments(q, k, v, offsets).flatten(1), f"{name}.self_attn.out_proj")
            h = self.layer_norm(x, f"{name}.layer_norm2")
            h = F.gelu(self.linear(h, f"{name}.mlp.fc1"), approximate="tanh")
            x = x + self.linear(h, f"{name}.mlp.fc2")
        x = self.layer_norm(x, f"{VISION}post_layernorm")
        layers = ("pre_norm", "linear_1", "linear_2")
        return project(x, grids, *(self.weights[f"mlp_AR.{n}.{part}"] for n in layers for part in ("weight", "bias")))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
    ) -> tuple[Tensor, Cache]:
        """Prefill of prompts [B, S]: logits [B, S, V] and the cache."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        grids = (image_grid_thw, video_grid_thw, second_per_grid_ts)
        position_ids, _ = rope_index(self.config, input_ids, *grids, attention_mask)
        x = F.embedding(input_ids, self.weights["model.embed_tokens.weight"])
        for token, pixels, grid_thw in (
            (self.config.image_token_id, pixel_values, image_grid_thw),
            (self.config.video_token_id, pixel_values_videos, video_grid_thw),
        ):
            if pixels is not None:
                place = (input_ids == token)[..., None].expand_as(x)
                x = x.masked_scatter(place, self.get_image_features(pixels, grid_thw).to(x.dtype))
        return self.decode(x, position_ids, mask, [])

    def step(self, token: Tensor, position: int, cache: Cache) -> tuple[Tensor, Cache]:
        """One decoding step without padding: token [B, 1] at `position` on all axes to logits [B, 1, V] and the longer cache."""
        x = F.embedding(token, self.weights["model.embed_tokens.weight"])
        position_ids = torch.full((3, *token.shape), position, device=token.device)
        mask = torch.ones(token.shape[0], cache[0][0].shape[2] + 1, device=token.device)
        return self.decode(x, position_ids, mask, cache)

    def decode(self, x: Tensor, position_ids: Tensor, attention_mask: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Decoder and head: embeddings [B, S, hidden] to logits [B, S, V] and the longer cache."""
        config = self.config
        exponent = torch.arange(0, config.head_dim, 2, device=x.device, dtype=torch.float32) / config.head_dim
        cos, sin = text_tables(position_ids, config.rope_theta**-exponent, x.dtype)
        mask = causal_mask(attention_mask, x.shape[1], x.dtype)
        new_cache = []
        for index in range(config.num_hidden_layers):
            name = f"model.layers.{index}"
            h = self.rms_norm(x, f"{name}.input_layernorm")
            q, k, v = (self.linear(h, f"{name}.self_attn.{part}_proj").unflatten(-1, (-1, config.head_dim)) for part in "qkv")
            q, k = self.rms_norm(q, f"{name}.self_attn.q_norm"), self.rms_norm(k, f"{name}.self_attn.k_norm")
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            q, k = rotate_text(q, k, cos, sin, config.mrope_section)
            if cache:
                k, v = (torch.cat(pair, dim=2) for pair in zip(cache[index], (k, v), strict=True))
            new_cache.append((k, v))
            h = attend(q, k, v, mask, config.head_dim**-0.5).transpose(1, 2).flatten(2)
            x = x + self.linear(h, f"{name}.self_attn.o_proj")
            h = self.rms_norm(x, f"{name}.post_attention_layernorm")
            gated = F.silu(self.linear(h, f"{name}.mlp.gate_proj")) * self.linear(h, f"{name}.mlp.up_proj")
            x = x + self.linear(gated, f"{name}.mlp.down_proj")
        return self.linear(self.rms_norm(x, "model.norm"), "lm_head"), new_cache
