"""Attention over packed sequences: a token attends within its own segment only."""

from collections.abc import Iterator
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .rope import compute_dtype

# Rows of scores held at the same time, so that memory is linear in the segment length
SCORE_ROWS = 512


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
    # SDPA's fused CPU kernel returns 0 for a query whose scores are all NaN
    is_finite = q.device.type != "cpu" or _is_finite(q, k)
    # It also multiplies the causal mask by the scale: -inf must stay -inf
    sign, scale = (1, softmax_scale) if softmax_scale > 0 else (-1, -softmax_scale) if softmax_scale < 0 else (0, 1.0)
    first, *inside, last = zip(*(x.split(sizes) for x in (q, k, v)), strict=True)
    outs, lses = [torch.zeros_like(first[0])], []
    for (length, number), packed in zip(runs, inside, strict=True):
        # [N, H, L, D]. SDPA's fused CPU kernel needs as many key heads as query heads
        query, key, value = (x.unflatten(0, (number, length)).transpose(1, 2) for x in packed)
        if (groups := q.shape[1] // k.shape[1]) > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        signed = query if sign == 1 else query * sign
        segments = F.scaled_dot_product_attention(signed, key, value, is_causal=causal, scale=scale)
        if not is_finite:
            one_by_one = zip(segments, query, key, value, strict=True)
            segments = torch.stack(
                [out if _is_finite(q, k) else _attend(q, k, v, softmax_scale, causal) for out, q, k, v in one_by_one]
            )
        outs.append(segments.transpose(1, 2).flatten(0, 1))
        if return_lse:
            lses += [_log_sum_exp(*pair, softmax_scale, causal) for pair in zip(query, key, strict=True)]
    out = torch.cat([*outs, torch.zeros_like(last[0])])
    if not return_lse:
        return out, q.new_zeros(q.shape[1], 0, dtype=compute_dtype(q))
    lse = torch.cat(lses, dim=1) if lses else q.new_zeros(q.shape[1], 0, dtype=compute_dtype(q))
    return out, F.pad(lse, (offsets[0], q.shape[0] - offsets[-1]), value=-torch.inf)


def _is_finite(q: Tensor, k: Tensor) -> bool:
    """A sum is finite only if all of its terms are. False for some finite tensors, whose sum overflows."""
    return bool((q.detach().sum() + k.detach().sum()).isfinite())


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Tensor:
    """[H, L, D] of one segment, without SDPA."""
    dtype = compute_dtype(query)
    rows = [scores.softmax(-1) @ value.to(dtype) for scores in _score_rows(query, key, scale, causal)]
    return torch.cat(rows, dim=1).to(query.dtype)


def _log_sum_exp(query: Tensor, key: Tensor, scale: float, causal: bool) -> Tensor:
    """[H, L] of [H, L, D] queries and keys."""
    return torch.cat([scores.logsumexp(-1) for scores in _score_rows(query, key, scale, causal)], dim=1)


def _score_rows(query: Tensor, key: Tensor, scale: float, causal: bool) -> Iterator[Tensor]:
    """Scores [H, rows, L] of SCORE_ROWS queries at a time, in the compute dtype, -inf where masked."""
    dtype = compute_dtype(query)
    key, columns = key.to(dtype).transpose(1, 2), torch.arange(key.shape[1], device=key.device)
    for first in range(0, query.shape[1], SCORE_ROWS):
        block = query[:, first : first + SCORE_ROWS].to(dtype)
        scores = block @ key * scale
        if causal:
            at = torch.arange(first, first + block.shape[1], device=key.device)
            scores = scores.masked_fill(columns > at[:, None], -torch.inf)
        yield scores
