"""`attn_implementation="keye"` for transformers.

Prompts run `ops.varlen_attention`. Decoding, and masks with padding between tokens, run SDPA.
Symbols: B sequences, S tokens and M keys per sequence, H query heads, Hk key heads, D head dim.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from keye_kernels import ops

NAME = "keye"
# `impl` of the tower's attention for each name in transformers; "auto" for other names
VISION_IMPLEMENTATIONS = {"eager": "reference", "sdpa": "reference", "flash_attention_2": "flash_attn"}


def register_attention() -> None:
    """Registers "keye" as an attention implementation. Without the mask function, transformers would pass no padding mask."""
    AttentionInterface.register(NAME, keye_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def keye_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls, for query [B, H, S, D] and key, value [B, Hk, M, D]; Hk divides H.

    Returns the output [B, S, H, D] and None instead of attention weights. `scaling` is the softmax scale. With `cu_seq_lens_q`
    [num_segments + 1], the offsets of segments in the B·S tokens, tokens attend within their segment, and `attention_mask`
    [B, 1, S, M] is not read. Vision towers, collators that pack, and Keye's prompts pass it. `kwargs` are passed to SDPA.
    """
    batch, _, length, _ = query.shape
    if cu_seq_lens_q is None and attention_mask is None and length == key.shape[2] and length > 1:
        # Without padding, each sequence is one segment
        cu_seq_lens_q = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * length
        max_length_q = length
    if cu_seq_lens_q is None or dropout:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # A static cache returns all its slots; a prompt is in the first ones
    packed = (x[:, :, :length].transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = ops.varlen_attention(*packed, cu_seq_lens_q.int(), int(max_length_q), softmax_scale=scaling, causal=causal)
    return out.unflatten(0, (batch, length)), None


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """`attn_implementation="eager"`: plain PyTorch that also returns the attention weights [B, H, S, M]."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights
