"""Attention over packed sequences. Symbols: T tokens, Hq query heads, Hk key heads, D head dim, S segments."""

from typing import Literal, overload

import torch
from torch import Tensor

from keye_kernels import reference
from keye_kernels.segments import Segments, tile_schedule

from .attention_libraries import flash_attn_attention, torch_attention, why_not_flash
from .checks import MAX_INT32, check_heads, check_number, check_tensor
from .implementation import check_impl, is_auto, kernel_dtype, kernel_inputs, log_choice, resolve
from .prepared import PREPARED, call_key, find, remember
from .registry import call, define_differentiable

MAX_HEAD_DIM = 256
MAX_GRID_RATIO = 16  # of tiles that a library launches to those with work


@overload
def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | Segments, max_seqlen: int | None = None, *,
    softmax_scale: float | None = None, causal: bool = False, return_lse: Literal[False] = False, impl: str = "auto",
) -> Tensor: ...  # fmt: skip


@overload
def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | Segments, max_seqlen: int | None = None, *,
    softmax_scale: float | None = None, causal: bool = False, return_lse: Literal[True], impl: str = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | Segments,
    max_seqlen: int | None = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Every token attends to the tokens of its own segment; with `causal`, to those up to itself.

    Memory is linear in T, except for second-order gradients. Offsets are checked on a CPU only, because reading them on a GPU
    would synchronize. There, offsets out of range give wrong results.

    Args:
        q: [T, Hq, D], any token and head stride, last axis contiguous; D a multiple of 8 up to 256.
        k: [T, Hk, D] in the dtype of q; Hk divides Hq, and query head h uses key head h // (Hq // Hk).
        v: like k.
        cu_seqlens: [S+1] int32; segment s holds the tokens cu_seqlens[s] to cu_seqlens[s+1]. Empty segments are allowed.
            Or `keye_kernels.segments.Segments`, which layers share: its tile schedule is built once per batch.
        max_seqlen: length of the longest segment; an upper bound is enough. Not needed with `Segments`, which know it.
        softmax_scale: default: D ** -0.5.
        causal: mask keys after the query.
        return_lse: also return the log of the sum of exp(scale * q·k).
        impl: "auto", "reference", "triton", "torch" (torch's FlashAttention-2, for fp16 and bf16 on CUDA) or "flash_attn"
            (the package of that name). On a GPU "auto" takes the faster of triton and torch from a timed table, or else triton.

    Returns:
        out [T, Hq, D], contiguous, in the dtype of q, 0 for tokens of no segment; with `return_lse` also lse [Hq, T] float32.

    Raises:
        ValueError: wrong shape, device or layout, decreasing offsets, or an implementation that cannot run this call.
        TypeError: wrong dtype or type.
    """
    segments, offsets = (cu_seqlens, cu_seqlens.cu_seqlens) if isinstance(cu_seqlens, Segments) else (None, cu_seqlens)
    calls, covers_all_tokens = PREPARED, segments is not None and segments.covers_all_tokens
    # is_compiling comes first: a guard on the lengths would compile anew for every batch
    if not torch.compiler.is_compiling() and segments is not None and segments.lengths is not None:
        calls = segments.prepared_calls  # a call with a schedule depends on the values of its segments
    longest = max_seqlen if segments is None else segments.max_seqlen
    key = call_key("varlen_attention", impl, (covers_all_tokens, longest, softmax_scale, causal, return_lse), q, k, v, offsets)
    if run := find(key, calls):
        out, lse = run(q, k, v, offsets)
        return (out, lse) if return_lse else out
    check_impl(impl, "varlen_attention")
    check_heads("q", q)
    check_heads("k", k, like=q)
    check_heads("v", v, like=q)
    check_tensor("v", v, tuple(k.shape), (k.dtype,), q)
    if k.dtype != q.dtype:
        raise TypeError(f"k must be {q.dtype} like q, got {k.dtype}")
    if q.shape[2] % 8 or not 0 < q.shape[2] <= MAX_HEAD_DIM:
        raise ValueError(f"q must have a head dim that is a multiple of 8 up to {MAX_HEAD_DIM}, got {q.shape[2]}")
    if q.shape[1] == 0:
        raise ValueError(f"q must have at least one head, got shape {list(q.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k must have a number of heads that divides the {q.shape[1]} of q, got {k.shape[1]}")
    check_tensor("cu_seqlens", offsets, ("num_segments + 1",), (torch.int32,), q)
    if offsets.shape[0] < 1:
        raise ValueError("cu_seqlens must have shape [num_segments + 1], got [0]")
    max_seqlen = longest
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, int | torch.SymInt):
        raise TypeError(f"max_seqlen must be an int, got {type(max_seqlen).__name__}")
    if not torch.compiler.is_compiling() and not 0 <= max_seqlen <= MAX_INT32:
        raise ValueError(f"max_seqlen must be from 0 to {MAX_INT32}, got {max_seqlen}")
    for name, value in (("causal", causal), ("return_lse", return_lse)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r:.100}")
    if softmax_scale is not None:
        check_number("softmax_scale", softmax_scale)
    scale = q.shape[2] ** -0.5 if softmax_scale is None else float(softmax_scale)
    schedule, block_m = None, 0
    if not torch.compiler.is_compiling() and segments is not None and segments.lengths is not None:
        if segments.num_tokens != q.shape[0]:
            raise ValueError(f"cu_seqlens must have segments of q's {q.shape[0]} tokens, got {segments.num_tokens} tokens in all")
        impl, block_m = _choose(impl, q, k, v, offsets, max_seqlen, scale, causal)
        schedule = segments.schedule(block_m, causal) if block_m else None
    common = q, k, v, offsets, max_seqlen, scale, causal, return_lse
    if key is not None and _choose(impl, *common[:-1])[0] == "triton":
        from keye_kernels.triton.varlen_attention import prepare

        remember(key, prepare(*common, schedule, covers_all_tokens), calls)
    out, lse = call(_attention_op, *common, impl, schedule, block_m, covers_all_tokens)
    return (out, lse) if return_lse else out


def _choose(
    impl: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, causal: bool
) -> tuple[str, int]:
    """The implementation of one call, "auto" replaced by a name, and the queries per tile where it is Triton's (else 0)."""
    automatic = is_auto(impl, "varlen_attention")
    impl = resolve(impl, "varlen_attention", q.device, q.dtype)
    if impl != "triton":
        return impl, 0
    from keye_kernels.triton.varlen_attention import attention_config

    config = attention_config(q.device, kernel_dtype(q), q.shape[2], max_seqlen, causal)
    if automatic:
        # The library's grid is segments x max_seqlen, which are upper bounds in a compiled graph
        is_padded = (cu_seqlens.shape[0] - 1) * max_seqlen > MAX_GRID_RATIO * q.shape[0]
        if config["backend"] == "torch" and not is_padded and not why_not_flash(q, k, v, cu_seqlens, max_seqlen, scale):
            impl = "torch"
        log_choice("varlen_attention", impl, q.device.type)
    return impl, int(config["BLOCK_M"]) if impl == "triton" else 0


def _run(q, k, v, cu_seqlens, max_seqlen, softmax_scale, causal, return_lse, impl, schedule, block_m, covers_all_tokens):
    common = q, k, v, cu_seqlens, max_seqlen, softmax_scale, causal, return_lse
    if schedule is None:
        impl, block_m = _choose(impl, q, k, v, cu_seqlens, max_seqlen, softmax_scale, causal)
    if impl == "reference":
        _check_offsets(cu_seqlens, q.shape[0])
        return reference.varlen_attention(q, k, v, cu_seqlens, softmax_scale, causal, return_lse)
    if impl == "torch":
        return torch_attention(*common, covers_all_tokens)
    if impl == "flash_attn":
        return flash_attn_attention(*common, covers_all_tokens)
    from keye_kernels.triton.varlen_attention import attention_config
    from keye_kernels.triton.varlen_attention import varlen_attention as run

    config = attention_config(q.device, kernel_dtype(q), q.shape[2], max_seqlen, causal)
    if config["BLOCK_M"] != block_m:  # tables were reloaded after the schedule was made
        schedule = None
    if schedule is None and cu_seqlens.device.type == "cpu":
        offsets = _check_offsets(cu_seqlens, q.shape[0])
        schedule = tile_schedule(cu_seqlens, config["BLOCK_M"], causal)
        covers_all_tokens = offsets[0] == 0 and offsets[-1] == q.shape[0]
    out, lse = run(*kernel_inputs(q, k, v), *common[3:], schedule, covers_all_tokens, config)
    return out.to(q.dtype), lse


def _check_offsets(cu_seqlens: Tensor, num_tokens: int) -> list[int]:
    """The offsets as integers. Raises ValueError where they do not rise from 0 or more to at most `num_tokens`."""
    offsets = cu_seqlens.tolist()
    if offsets != sorted(offsets) or offsets[0] < 0 or offsets[-1] > num_tokens:
        raise ValueError(f"cu_seqlens must rise from 0 or more to at most q's {num_tokens} tokens, got {offsets}")
    return offsets


def _reference(q, k, v, cu_seqlens, max_seqlen, softmax_scale, causal, return_lse, impl, schedule, block_m, covers_all_tokens):
    return reference.varlen_attention(q, k, v, cu_seqlens, softmax_scale, causal, return_lse)


def _fake(q, k, v, cu_seqlens, max_seqlen, softmax_scale, causal, return_lse, impl, schedule, block_m, covers_all_tokens):
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0] if return_lse else 0), dtype=dtype)


define_differentiable(
    "varlen_attention",
    "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, float softmax_scale, bool causal, bool return_lse, "
    "str impl, Tensor? schedule, int block_m, bool covers_all_tokens",
    "(Tensor, Tensor)",
    _run, _fake, _reference, differentiable=[0, 1, 2],
)  # fmt: skip
_attention_op = torch.ops.keye_kernels.varlen_attention.default
