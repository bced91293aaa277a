"""Attention over packed sequences. Symbols: T tokens, Hq query heads, Hk key heads, D head dim, S segments."""

import torch
from torch import Tensor

from keye_kernels import reference

from .checks import check_heads, check_tensor
from .implementation import check_impl, resolve
from .registry import call, define_differentiable

MAX_HEAD_DIM = 256


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Every token attends to the tokens of its own segment (with `causal`: to those up to itself).

    Args:
        q: [T, Hq, D], any token and head strides, last axis contiguous; D a multiple of 8 up to 256.
        k, v: [T, Hk, D], Hk a divisor of Hq; query head h reads key head h // (Hq // Hk). Dtype of q.
        cu_seqlens: [S+1] int32, segment s holds tokens cu_seqlens[s] to cu_seqlens[s+1]; empty segments are allowed.
        max_seqlen: length of the longest segment (an upper bound will do; it only guides the choice of tiles).
        softmax_scale: D ** -0.5 unless given.
        return_lse: also return the log of the sum of exp(scale * q·k).
        impl: "auto", "reference", "triton" or "flash_attn" (the package of that name, for fp16 and bf16 on CUDA).

    Returns: out [T, Hq, D], contiguous, in the dtype of q (zero for tokens of no segment), or (out, lse [Hq, T] float32).
    Raises: ValueError or TypeError naming the argument. Memory is linear in T for every implementation.
    """
    check_impl(impl)
    check_heads("q", q)
    check_heads("k", k, like=q)
    check_heads("v", v, like=q)
    check_tensor("v", v, tuple(k.shape), (k.dtype,), q)
    if k.dtype != q.dtype:
        raise TypeError(f"k must be {q.dtype} like q, got {k.dtype}")
    if q.shape[2] % 8 or not 0 < q.shape[2] <= MAX_HEAD_DIM:
        raise ValueError(f"q must have a head dim that is a multiple of 8 up to {MAX_HEAD_DIM}, got {q.shape[2]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k must have a number of heads that divides the {q.shape[1]} of q, got {k.shape[1]}")
    check_tensor("cu_seqlens", cu_seqlens, ("num_segments + 1",), (torch.int32,), q)
    if cu_seqlens.shape[0] < 1:
        raise ValueError("cu_seqlens must have shape [num_segments + 1], got [0]")
    if not isinstance(max_seqlen, int | torch.SymInt):
        raise TypeError(f"max_seqlen must be an int, got {type(max_seqlen).__name__}")
    scale = q.shape[2] ** -0.5 if softmax_scale is None else float(softmax_scale)
    out, lse = call(_attention_op, q, k, v, cu_seqlens, max_seqlen, scale, causal, return_lse, impl)
    return (out, lse) if return_lse else out


def _run(q, k, v, cu_seqlens, max_seqlen, softmax_scale, causal, return_lse, impl):
    impl = resolve(impl, "varlen_attention", q.device)
    if impl == "triton":
        from keye_kernels.triton.varlen_attention import varlen_attention as run
    elif impl == "flash_attn":
        from .flash_attention import varlen_attention as run
    else:
        return _reference(q, k, v, cu_seqlens, max_seqlen, softmax_scale, causal, return_lse, impl)
    return run(q, k, v, cu_seqlens, max_seqlen, softmax_scale, causal, return_lse)


def _reference(q, k, v, cu_seqlens, max_seqlen, softmax_scale, causal, return_lse, impl):
    return reference.varlen_attention(q, k, v, cu_seqlens, softmax_scale, causal, return_lse)


def _fake(q, k, v, cu_seqlens, max_seqlen, softmax_scale, causal, return_lse, impl):
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0] if return_lse else 0), dtype=dtype)


define_differentiable(
    "varlen_attention",
    "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, float softmax_scale, bool causal, bool return_lse, "
    "str impl",
    "(Tensor, Tensor)",
    _run,
    _fake,
    _reference,
    differentiable=[0, 1, 2],
)
_attention_op = torch.ops.keye_kernels.varlen_attention.default
