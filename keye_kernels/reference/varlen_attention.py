"""Attention over packed sequences: a token attends within its own segment only."""

from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .rope import compute_dtype

# Rows of scores held at the same time, so that memory is linear in the segment length
LSE_ROWS = 512


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, softmax_scale: float, causal: bool, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q kᵀ) v, segment by segment. The values of cu_seqlens [S+1] are read on the host.

    q is [T, Hq, D]; k and v are [T, Hk, D], and query head h uses key head h // (Hq // Hk). Returns out [T, Hq, D], zero for
    tokens of no segment, and lse [Hq, T], the log-sum-exp of the scores in float32 (empty unless `return_lse`).
    """
    offsets = cu_seqlens.tolist()
    # Adjacent segments of equal length share one SDPA call, and one in the backward pass
    lengths = (end - start for start, end in pairwise(offsets))
    runs = [(length, len(list(run))) for length, run in groupby(lengths) if length]
    sizes = [offsets[0], *(length * number for length, number in runs), q.shape[0] - offsets[-1]]
    first, *inside, last = zip(*(x.split(sizes) for x in (q, k, v)), strict=True)
    outs, lses = [torch.zeros_like(first[0])], []
    for (length, number), packed in zip(runs, inside, strict=True):
        # [N, H, L, D]. SDPA's fused CPU kernel needs as many key heads as query heads
        query, key, value = (x.unflatten(0, (number, length)).transpose(1, 2) for x in packed)
        if (groups := q.shape[1] // k.shape[1]) > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        segments = F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=softmax_scale)
        outs.append(segments.transpose(1, 2).flatten(0, 1))
        if return_lse:
            lses += [_log_sum_exp(*pair, softmax_scale, causal) for pair in zip(query, key, strict=True)]
    out = torch.cat([*outs, torch.zeros_like(last[0])])
    if not return_lse:
        return out, q.new_zeros(q.shape[1], 0, dtype=compute_dtype(q))
    lse = torch.cat(lses, dim=1) if lses else q.new_zeros(q.shape[1], 0, dtype=compute_dtype(q))
    return out, F.pad(lse, (offsets[0], q.shape[0] - offsets[-1]), value=-torch.inf)


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
