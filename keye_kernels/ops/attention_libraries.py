"""Packed attention through other libraries: the FlashAttention-2 that ships with torch, and the flash-attn package.

Symbols: T tokens, Hq query heads, Hk key heads, D head dim, S segments.
"""

from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def why_not_flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, softmax_scale: float) -> str | None:
    """Why FlashAttention-2, torch's or the package, cannot compute this call exactly; None where it can. Reads metadata only."""
    if q.device.type != "cuda" or q.dtype not in HALF:
        return f"it needs float16 or bfloat16 tensors on a CUDA or ROCm device, got {q.dtype} on {q.device}"
    if not all(x.data_ptr() % 16 == 0 and not (x.stride(0) | x.stride(1)) % 8 for x in (q, k, v)):
        return "it needs q, k and v aligned to 16 bytes, with strides that are multiples of 8 elements"
    if softmax_scale <= 0:  # it multiplies the mask's -inf by the scale
        return f"it needs a positive softmax_scale, got {softmax_scale}"
    if max_seqlen <= 1:  # it takes segments of one token for a batch without gaps
        return f"it needs a max_seqlen of at least 2, got {max_seqlen}"
    if cu_seqlens.shape[0] < 2:
        return "it needs at least one segment"
    return None


def _require_flash(impl: str, *call: Any) -> None:
    if reason := why_not_flash(*call):
        raise ValueError(f"impl={impl!r} cannot run this varlen_attention: {reason}; use impl='triton' or impl='auto'")


def torch_attention(q, k, v, cu_seqlens, max_seqlen, softmax_scale, causal, return_lse, covers_all_tokens):
    """(out, lse) as the operator. Raises ValueError where `why_not_flash` has a reason."""
    _require_flash("torch", q, k, v, cu_seqlens, max_seqlen, softmax_scale)
    # What torch.nn.attention.varlen calls, and older versions of torch have as well
    segments = (cu_seqlens.contiguous(), cu_seqlens.contiguous(), max_seqlen, max_seqlen)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *segments, 0.0, causal, False, scale=softmax_scale)
    return _finish(q, out, lse, cu_seqlens, return_lse, covers_all_tokens)


def flash_attn_attention(q, k, v, cu_seqlens, max_seqlen, softmax_scale, causal, return_lse, covers_all_tokens):
    """(out, lse) as the operator. Raises ValueError where flash-attn cannot be imported or `why_not_flash` has a reason."""
    _require_flash("flash_attn", q, k, v, cu_seqlens, max_seqlen, softmax_scale)
    try:
        from flash_attn import flash_attn_varlen_func
    except Exception as error:  # a build for another torch can raise anything
        raise ValueError(
            f"impl='flash_attn' cannot import flash-attn ({type(error).__name__}: {error}); "
            "install a build for this torch with `pip install flash-attn --no-build-isolation`, or use impl='triton'"
        ) from error
    segments = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    options = {"softmax_scale": softmax_scale, "causal": causal, "return_attn_probs": True}
    out, lse, _ = flash_attn_varlen_func(q, k, v, *segments, **options)
    return _finish(q, out, lse, cu_seqlens, return_lse, covers_all_tokens)


def _finish(q, out, lse, cu_seqlens, return_lse, covers_all_tokens):
    """Fills the rows of tokens without a segment, which the libraries leave uninitialized."""
    out, lse = out.contiguous(), lse if return_lse else lse.new_empty(q.shape[1], 0)
    if not covers_all_tokens:
        token = torch.arange(q.shape[0], device=q.device)
        outside = (token < cu_seqlens[0]) | (token >= cu_seqlens[-1])
        out.masked_fill_(outside[:, None, None], 0)
        if return_lse:
            lse.masked_fill_(outside, -torch.inf)
    return out, lse
