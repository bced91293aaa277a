"""`varlen_attention` through the flash-attn package, where it is installed."""

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    causal: bool,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """As the operator; ValueError where flash-attn is missing, broken or does not serve these tensors."""
    if q.device.type != "cuda" or q.dtype not in HALF:
        raise ValueError(
            f"impl='flash_attn' needs float16 or bfloat16 tensors on a CUDA device, got {q.dtype} on {q.device}"
        )
    try:
        from flash_attn import flash_attn_varlen_func
    except Exception as error:  # a build for another torch fails with whatever the loader raises
        raise ValueError(
            f"impl='flash_attn' cannot import flash-attn ({type(error).__name__}: {error}); "
            "install a build for this torch with `pip install flash-attn --no-build-isolation`, or use impl='triton'"
        ) from error
    out, lse, _ = flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
        softmax_scale=softmax_scale, causal=causal, return_attn_probs=True,
    )  # fmt: skip
    return out, lse if return_lse else lse.new_empty(q.shape[1], 0)
