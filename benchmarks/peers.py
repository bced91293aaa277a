"""Whether and how the implementations that a benchmark compares can run here.

`official` is the official code's eager maths (`baseline`), `compiled` torch.compile of it, `sdpa` torch's attention,
`torch_flash` the packed FlashAttention-2 that torch brings, `liger` and `flash_attn` the packages of that name, `reference`,
`triton` and `auto` ours. What cannot run raises `Unavailable`.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from keye_kernels.ops.implementation import resolve

OURS = ("reference", "triton", "auto")


class Unavailable(Exception):
    """An implementation cannot run here; the message says why."""


def is_interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter in this process, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check_ours(impl: str, device: torch.device) -> None:
    """Unavailable unless the operators of this package can run `impl` on `device`."""
    if impl == "triton" and is_interpreting():
        raise Unavailable(
            "triton: TRITON_INTERPRET=1 is set, and numbers from the interpreter are never shown as speed"
        )
    try:
        resolve(impl, "the operator", device)
    except ValueError as error:
        raise Unavailable(f"{impl}: {error}") from error


def compiled(function: Callable[..., Any], *arguments: Any, smoke: bool) -> Callable[[], Any]:
    """torch.compile of `function`, compiled for these arguments now; not in a smoke test, which it would make slow."""
    if smoke:
        raise Unavailable(
            "compiled: not with --benchmark-disable, since compiling takes longer than the whole smoke test"
        )
    torch._dynamo.reset()
    call = torch.compile(function)
    try:
        call(*arguments)
    except Exception as error:  # no C++ compiler, no Triton for this GPU, ...
        raise Unavailable(f"compiled: torch.compile failed ({type(error).__name__}): {str(error)[:200]}") from error
    return lambda: call(*arguments)


def liger_rope_3d(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    tables: tuple[Tensor, Tensor],
    sections: list[int],
    eps: float,
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Liger's RMSNorm of q and of k, then its mRoPE in place on their outputs; the tables [3, 1, T, D] are made outside."""
    _require_cuda("liger", q)
    with _imports("liger", "liger-kernel"):
        from liger_kernel.transformers.functional import liger_rms_norm
        from liger_kernel.transformers.qwen2vl_mrope import liger_multimodal_rotary_pos_emb

    def call() -> tuple[Tensor, Tensor]:
        normed = (liger_rms_norm(x, w, eps)[None].transpose(1, 2) for x, w in ((q, q_weight), (k, k_weight)))
        turned = liger_multimodal_rotary_pos_emb(*normed, *tables, sections)
        return tuple(x.transpose(1, 2)[0] for x in turned)

    return call


def flash_rope_2d(q: Tensor, k: Tensor, tables: tuple[Tensor, Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
    """flash-attn's rotary kernel as the official tower calls it: q and k cast up, turned, cast down; tables [T, D/2]."""
    _require_cuda("flash_attn", q)
    with _imports("flash_attn", "flash-attn"):
        from flash_attn.layers.rotary import apply_rotary_emb
    cos, sin = (x[:, : x.shape[1] // 2].contiguous().float() for x in tables)

    def turn(x: Tensor) -> Tensor:
        return apply_rotary_emb(x[None].float(), cos, sin)[0].to(x.dtype)

    return lambda: (turn(q), turn(k))


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool
) -> Callable[[], Tensor]:
    """flash-attn's varlen attention, called directly."""
    _require_cuda("flash_attn", q)
    with _imports("flash_attn", "flash-attn"):
        from flash_attn import flash_attn_varlen_func
    return lambda: flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=causal)


def torch_flash(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool
) -> Callable[[], Tensor]:
    """torch's own FlashAttention-2 of packed sequences; what `torch.nn.attention.varlen` calls, and older torch has too."""
    _require_cuda("torch_flash", q)
    attend = torch.ops.aten._flash_attention_forward
    lengths = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    return lambda: attend(q, k, v, *lengths, 0.0, causal, False, scale=q.shape[-1] ** -0.5)[0]


def sdpa_segments(q: Tensor, k: Tensor, v: Tensor, offsets: list[int], causal: bool) -> Tensor:
    """torch's scaled_dot_product_attention, a call for each segment, as transformers' packed towers do it."""
    outs = []
    lengths = [end - start for start, end in pairwise(offsets)]
    for query, key, value in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        options = {"is_causal": causal, "enable_gqa": q.shape[1] != k.shape[1]}
        outs.append(F.scaled_dot_product_attention(query, key, value, **options)[0].transpose(0, 1))
    return torch.cat(outs)


def _require_cuda(impl: str, x: Tensor) -> None:
    if x.device.type != "cuda":
        raise Unavailable(f"{impl}: needs a CUDA device, and these tensors are on {x.device}")


@contextmanager
def _imports(impl: str, package: str) -> Iterator[None]:
    """Unavailable where an import inside the block fails: a build for another torch may raise anything."""
    try:
        yield
    except Exception as error:
        raise Unavailable(
            f"{impl}: cannot import it ({type(error).__name__}: {str(error)[:200]}); pip install {package} --no-build-isolation"
        ) from error
