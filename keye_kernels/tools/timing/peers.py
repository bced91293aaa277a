"""The implementations that the benchmarks compare, and how each of them is called.

| name | implementation |
|---|---|
| `official (eager)` | the arithmetic of the official code in eager PyTorch (`baseline.py`) |
| `torch.compile` | `torch.compile` of the official arithmetic |
| `transformers + SDPA` | the transformers model of `keye_kernels.auto` with SDPA attention |
| `transformers + torch.compile` | `torch.compile` of the vision tower and the projector of that model |
| `stock + SDPA`, `patched` | PaddleOCR-VL of transformers before and after `kk.apply_keye_kernels` |
| `one image after the other` | images read by Pillow one by one, as float32 patches; then the model of keye_kernels |
| `keye_kernels, one thread` | the image processor of keye_kernels without helper threads |
| `SDPA` | `torch.nn.functional.scaled_dot_product_attention`, one call per segment |
| `torch FlashAttention` | the varlen FlashAttention kernel that is part of torch |
| `cuDNN` | cuDNN's attention through torch's SDPA, for segments of one length |
| `flash-attn`, `FlashAttention-4` | the flash-attn package, the flash-attn-4 package |
| `Liger-Kernel` | the liger-kernel package |
| `reference`, `triton`, `auto` | the operators of keye_kernels with this `impl` |

A function raises `Unavailable` if its implementation cannot run on this machine.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from keye_kernels.ops.implementation import resolve

OFFICIAL = "official (eager)"
COMPILED = "torch.compile"
TRANSFORMERS = "transformers + SDPA"
COMPILED_TOWER = "transformers + torch.compile"
SDPA = "SDPA"
CUDNN = "cuDNN"
TORCH_FLASH = "torch FlashAttention"
FLASH_ATTN = "flash-attn"
FLASH_ATTN_4 = "FlashAttention-4"
LIGER = "Liger-Kernel"
ONE_BY_ONE = "one image after the other"
ONE_THREAD = "keye_kernels, one thread"
OURS = ("reference", "triton", "auto")
STOCK, PATCHED = "stock + SDPA", "patched"  # a tower of transformers before and after `kk.apply_keye_kernels`
MAX_UNROLLED_ITERATIONS = 16
MAX_SCORE_BYTES = 16 << 30


class Unavailable(Exception):
    """An implementation cannot run here. The message names the implementation and the reason."""


def is_interpreting() -> bool:
    """Whether Triton kernels run in the interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check_ours(impl: str, device: torch.device) -> None:
    """Raises `Unavailable` unless the operators of keye_kernels can run `impl` on `device`."""
    if impl == "triton" and is_interpreting():
        raise Unavailable("triton: TRITON_INTERPRET=1 is set, and times of the interpreter are not reported")
    try:
        resolve(impl, "rope_3d", device)  # every operator has these implementations
    except ValueError as error:
        raise Unavailable(f"{impl}: {error}") from error


def check_scores(heads: int, length: int) -> None:
    """Raises `Unavailable` if the official arithmetic would need too much memory for the attention scores of one segment."""
    if (size := heads * length**2 * (2 + 4)) > MAX_SCORE_BYTES:  # in half precision, and in float32 for the softmax
        raise Unavailable(f"{OFFICIAL}: attention scores of {length} tokens need {size / 2**30:.0f} GiB")


def compiled(function: Callable[..., Any], *arguments: Any, is_timed: bool, loop_iterations: int = 1) -> Callable[[], Any]:
    """`torch.compile` of `function`, compiled for `arguments` before it is returned.

    Args:
        function: the function to compile.
        arguments: its arguments.
        is_timed: False in a test run, which compilation would make several times slower.
        loop_iterations: iterations of the Python loop in `function`. torch.compile unrolls it.

    Raises:
        Unavailable: in a test run, for a loop that is too long, and if compilation fails.
    """
    if not is_timed:
        raise Unavailable(f"{COMPILED}: not compiled in a run without timing, because compilation is slow")
    if loop_iterations > MAX_UNROLLED_ITERATIONS:
        raise Unavailable(
            f"{COMPILED}: it would unroll {loop_iterations} loop iterations, the limit is {MAX_UNROLLED_ITERATIONS}"
        )
    torch._dynamo.reset()
    call = torch.compile(function)
    try:
        call(*arguments)
    except Exception as error:  # no C++ compiler, no Triton for this GPU, ...
        raise Unavailable(f"{COMPILED}: compilation failed ({type(error).__name__}): {str(error)[:200]}") from error
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
    """Liger's RMSNorm of q and of k, then its M-RoPE in place. The cos and sin tables are [3, 1, T, D]."""
    _require_cuda(LIGER, q)
    with _imports(LIGER, "liger-kernel"):
        from liger_kernel.transformers.functional import liger_rms_norm
        from liger_kernel.transformers.qwen2vl_mrope import liger_multimodal_rotary_pos_emb

    def call() -> tuple[Tensor, Tensor]:
        normed = (liger_rms_norm(x, w, eps)[None].transpose(1, 2) for x, w in ((q, q_weight), (k, k_weight)))
        rotated = liger_multimodal_rotary_pos_emb(*normed, *tables, sections)
        return tuple(x.transpose(1, 2)[0] for x in rotated)

    return call


def liger_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Callable[[], tuple[Tensor, Tensor]]:
    """Liger's fused residual add and RMSNorm: the sum, and its norm."""
    _require_cuda(LIGER, x)
    with _imports(LIGER, "liger-kernel"):
        from liger_kernel.transformers.functional import liger_fused_add_rms_norm
    return lambda: liger_fused_add_rms_norm(x, residual, weight, eps)[::-1]


def liger_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Callable[[], tuple[Tensor, Tensor]]:
    """torch's residual add and Liger's LayerNorm, which has no add."""
    _require_cuda(LIGER, x)
    with _imports(LIGER, "liger-kernel"):
        from liger_kernel.transformers.functional import liger_layer_norm

    def call() -> tuple[Tensor, Tensor]:
        total = residual + x
        return total, liger_layer_norm(total, weight, bias, eps)

    return call


def liger_silu_mul(gate: Tensor, up: Tensor) -> Callable[[], Tensor]:
    """Liger's SwiGLU. It would copy views first, so it gets contiguous tensors."""
    _require_cuda(LIGER, gate)
    with _imports(LIGER, "liger-kernel"):
        from liger_kernel.transformers.functional import liger_swiglu
    gate, up = gate.contiguous(), up.contiguous()
    return lambda: liger_swiglu(gate, up)


def flash_rope_2d(q: Tensor, k: Tensor, tables: tuple[Tensor, Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
    """flash-attn's rotary kernel, called as the official vision tower does: in float32, with casts before and after it."""
    _require_cuda(FLASH_ATTN, q)
    with _imports(FLASH_ATTN, "flash-attn"):
        from flash_attn.layers.rotary import apply_rotary_emb
    cos, sin = (x[:, : x.shape[1] // 2].contiguous().float() for x in tables)  # [T, D/2]

    def rotate(x: Tensor) -> Tensor:
        return apply_rotary_emb(x[None].float(), cos, sin)[0].to(x.dtype)

    return lambda: (rotate(q), rotate(k))


def flash_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool) -> Callable[[], Tensor]:
    """`flash_attn_varlen_func` of the flash-attn package."""
    _require_cuda(FLASH_ATTN, q)
    with _imports(FLASH_ATTN, "flash-attn"):
        from flash_attn import flash_attn_varlen_func
    return lambda: flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=causal)


def flash_attention_4(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool) -> Callable[[], Tensor]:
    """`flash_attn_varlen_func` of the flash-attn-4 package."""
    _require_cuda(FLASH_ATTN_4, q)
    with _imports(FLASH_ATTN_4, "flash-attn-4"):
        from flash_attn.cute.interface import flash_attn_varlen_func
    lengths = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": max_seqlen, "max_seqlen_k": max_seqlen}

    def call() -> Tensor:
        found = flash_attn_varlen_func(q, k, v, **lengths, causal=causal)
        return found[0] if isinstance(found, tuple) else found

    return call


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, offsets: list[int], causal: bool) -> Callable[[], Tensor]:
    """torch's SDPA with cuDNN: one batch of segments, which must have one length."""
    _require_cuda(CUDNN, q)
    lengths = {end - start for start, end in pairwise(offsets)}
    if len(lengths) > 1:
        raise Unavailable(f"{CUDNN}: needs segments of one length, got {min(lengths)} to {max(lengths)}")
    batch = [x.unflatten(0, (-1, *lengths)).transpose(1, 2) for x in (q, k, v)]
    is_grouped = q.shape[1] != k.shape[1]

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(*batch, is_causal=causal, enable_gqa=is_grouped)
        return out.transpose(1, 2).flatten(0, 1)

    return call


def torch_flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool) -> Callable[[], Tensor]:
    """The operator behind `torch.nn.attention.varlen`, called directly: older torch releases have only the operator."""
    _require_cuda(TORCH_FLASH, q)
    attend = torch.ops.aten._flash_attention_forward
    lengths = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    return lambda: attend(q, k, v, *lengths, 0.0, causal, False, scale=q.shape[-1] ** -0.5)[0]


def sdpa_segments(q: Tensor, k: Tensor, v: Tensor, offsets: list[int], causal: bool) -> Tensor:
    """One `scaled_dot_product_attention` call per segment, as the packed vision towers of transformers do."""
    outs = []
    lengths = [end - start for start, end in pairwise(offsets)]
    for query, key, value in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        options = {"is_causal": causal, "enable_gqa": q.shape[1] != k.shape[1]}
        outs.append(F.scaled_dot_product_attention(query, key, value, **options)[0].transpose(0, 1))
    return torch.cat(outs)


def _require_cuda(name: str, x: Tensor) -> None:
    if x.device.type != "cuda":
        raise Unavailable(f"{name}: needs tensors on a CUDA device, got {x.device}")


@contextmanager
def _imports(name: str, package: str) -> Iterator[None]:
    """Turns any error of an import into `Unavailable`. A package built for another torch can raise any exception."""
    try:
        yield
    except Exception as error:
        raise Unavailable(
            f"{name}: the import failed ({type(error).__name__}: {str(error)[:200]}); pip install {package} --no-build-isolation"
        ) from error
