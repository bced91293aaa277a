"""`attn_implementation="keye"` for transformers: this package's packed attention where it fits, SDPA elsewhere.

Symbols: B rows, S tokens of a row, M keys of a row, H query heads, Hk key heads, D head dim.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from keye_kernels import ops

NAME = "keye"
# What the tower runs for a name that transformers knows: PyTorch alone, flash-attn, or else what the device offers
VISION_IMPLEMENTATIONS = {"eager": "reference", "sdpa": "reference", "flash_attention_2": "flash_attn"}


def register_attention() -> None:
    """Makes the name "keye" known. Without a mask function of its own, padded batches would get no mask at all."""
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
    """An attention function of transformers.

    Args:
        query: [B, H, S, D]; key, value: [B, Hk, M, D], Hk a divisor of H.
        attention_mask: [B, 1, S, M] or None.
        cu_seq_lens_q: int32 offsets of the segments in the B·S tokens, of which the longest has `max_length_q`; tokens
            attend within their own and the mask is not read. Given by packed towers, by collators that pack, and by
            Keye for a prompt.

    Returns: [B, S, H, D] and None (no weights).
    """
    batch, _, length, _ = query.shape
    if cu_seq_lens_q is None and attention_mask is None and length == key.shape[2] and length > 1:
        # Rows without padding are segments of one length
        cu_seq_lens_q = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * length
        max_length_q = length
    if cu_seq_lens_q is None or dropout:
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # A static cache hands out all its slots; a prompt stands in the first ones
    packed = (x[:, :, :length].transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = ops.varlen_attention(*packed, cu_seq_lens_q.int(), int(max_length_q), softmax_scale=scaling, causal=causal)
    return out.unflatten(0, (batch, length)), None


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """`attn_implementation="eager"`: every step a tensor of its own; returns the weights [B, H, S, M] as well."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights
