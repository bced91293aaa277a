"""Attention of new tokens to a key/value cache that holds them."""

import torch
from torch import Tensor

from .rope import compute_dtype


def cache_attention(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, valid: Tensor, slots: Tensor, softmax_scale: float
) -> Tensor:
    """softmax(scale * q kᵀ) v over the valid slots up to that of each token; 0 for a token without any.

    q is [T, Hq, D] with T = B·S, the caches are [B, M, Hk, D], valid is [B, M] bool and slots [S]. Returns [T, Hq, D].
    """
    (batch_size, _, key_heads, head_dim), dtype = key_cache.shape, compute_dtype(q)
    group = q.shape[1] // key_heads
    query = q.to(dtype).view(batch_size, -1, key_heads, group, head_dim)
    is_seen = torch.arange(key_cache.shape[1], device=q.device) <= slots[:, None]  # [S, M]
    masked = ~(valid[:, None] & is_seen)[:, :, None, None]  # [B, S, 1, 1, M]
    # What is not valid may be NaN
    key, value = (x.to(dtype).masked_fill(~valid[..., None, None], 0) for x in (key_cache, value_cache))
    scores = torch.einsum("bshgd,bmhd->bshgm", query, key) * softmax_scale
    probabilities = scores.masked_fill(masked, -torch.inf).softmax(-1).masked_fill(masked, 0)
    return torch.einsum("bshgm,bmhd->bshgd", probabilities, value).reshape(q.shape).to(q.dtype)
