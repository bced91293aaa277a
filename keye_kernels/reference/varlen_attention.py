"""Attention of packed sequences: a token attends within its own segment only."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .rope import compute_dtype

LSE_ROWS = 512  # rows of scores held at a time: memory stays linear in the length of a segment


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, softmax_scale: float, causal: bool, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q kᵀ) v, segment by segment.

    Args:
        q: [T, Hq, D]; k, v: [T, Hk, D], query head h reads key head h // (Hq // Hk).
        cu_seqlens: [S+1], segment s holds tokens cu_seqlens[s] to cu_seqlens[s+1]; its values are read.

    Returns: out [T, Hq, D], zero for tokens of no segment, and lse [Hq, T] (float32; empty unless `return_lse`).
    """
    groups = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full((q.shape[1], q.shape[0] if return_lse else 0), -torch.inf, dtype=compute_dtype(q), device=q.device)
    offsets = cu_seqlens.tolist()
    if offsets != sorted(offsets) or offsets[0] < 0 or offsets[-1] > q.shape[0]:
        raise ValueError(f"cu_seqlens must rise from 0 or more to at most q's {q.shape[0]} tokens, got {offsets}")
    for start, end in pairwise(offsets):
        if start == end:
            continue
        # [1, H, L, D]; SDPA's fused CPU path wants as many key heads as query heads
        query, key, value = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        segment = F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=softmax_scale)
        out[start:end] = segment[0].transpose(0, 1)
        if return_lse:
            lse[:, start:end] = _log_sum_exp(query[0], key[0], softmax_scale, causal)
    return out, lse


def _log_sum_exp(query: Tensor, key: Tensor, scale: float, causal: bool) -> Tensor:
    """[H, L] of [H, L, D] queries and keys."""
    dtype = compute_dtype(query)
    key, columns = key.to(dtype).transpose(1, 2), torch.arange(key.shape[1], device=key.device)
    rows = []
    for first in range(0, query.shape[1], LSE_ROWS):
        block = query[:, first : first + LSE_ROWS].to(dtype)
        scores = block @ key * scale
        if causal:
            at = torch.arange(first, first + block.shape[1], device=key.device)
            scores = scores.masked_fill(columns > at[:, None], -torch.inf)
        rows.append(scores.logsumexp(-1))
    return torch.cat(rows, dim=1)
