"""Varlen attention and torch's own rates as benchmark cases."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from keye_kernels import ops
from keye_kernels.segments import Segments

from . import baseline, peers
from .measuring import RequiredWork, nbytes
from .shapes import MIXED_GRIDS
from .stages import BenchmarkCase, Call


class AttentionSize(NamedTuple):
    """Segment lengths and heads of one call of varlen attention."""

    lengths: list[int]
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool


def vision(*lengths: int, heads: int = 16) -> AttentionSize:
    return AttentionSize(list(lengths), heads, heads, 72, False)


def text(*lengths: int, heads: int = 32, kv_heads: int = 8) -> AttentionSize:
    return AttentionSize(list(lengths), heads, kv_heads, 128, True)


ATTENTION = {
    "1_image_256": vision(256),
    "1_image_1024": vision(1024),
    "16_images_mixed": vision(*(h * w for _, h, w in MIXED_GRIDS)),
    "ragged_576_252_112_84": vision(576, 252, 112, 84),
    "16_images_1024": vision(*[1024] * 16),
    "1_image_5120": vision(5120),
    "64_frames_448": vision(*[448] * 64),
    "1_segment_28672": vision(28672),
    "video_768_frames_slow_fast": vision(*[448, *[112] * 5] * 128),
    "prompt_1k": text(1024),
    "8_prompts_1k": text(*[1024] * 8),
    "prompt_8k": text(8192),
}
SMALL_ATTENTION = {
    "1_image_64": vision(64, heads=2),
    "ragged_24_16_9": vision(24, 16, 9, heads=2),
    "prompt_48": text(48, heads=4, kv_heads=2),
}


def attention(size: AttentionSize, dtype: torch.dtype, device: torch.device) -> BenchmarkCase:
    """One call of varlen attention: q, k, v [T, H, D] to [T, H, D]. torch.compile is not among the implementations."""
    lengths, heads, kv_heads, head_dim, causal = size
    tokens = sum(lengths)
    torch.manual_seed(0)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype, device=device)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    segments = Segments.from_lengths(lengths, device)  # layers share it, so its tile schedule is not part of the call
    cu_seqlens, max_seqlen = segments.cu_seqlens, segments.max_seqlen
    offsets = cu_seqlens.tolist()

    def ours(impl: str) -> Callable[[], Call]:
        def make() -> Call:
            peers.check_ours(impl, device)
            return lambda: ops.varlen_attention(q, k, v, segments, max_seqlen, causal=causal, impl=impl)

        return make

    def official() -> Call:
        peers.check_scores(heads, max(lengths))
        return lambda: baseline.attend_segments(q, k, v, offsets, causal=causal)

    def reference() -> Tensor:
        float_qkv = (x.float() for x in (q, k, v))
        return ops.varlen_attention(*float_qkv, cu_seqlens, max_seqlen, causal=causal, impl="reference")

    make = {
        peers.OFFICIAL: official,
        peers.SDPA: lambda: lambda: peers.sdpa_segments(q, k, v, offsets, causal),
        peers.TORCH_FLASH: lambda: peers.torch_flash(q, k, v, cu_seqlens, max_seqlen, causal),
        peers.CUDNN: lambda: peers.cudnn_attention(q, k, v, offsets, causal),
        peers.FLASH_ATTN: lambda: peers.flash_attention(q, k, v, cu_seqlens, max_seqlen, causal),
        peers.FLASH_ATTN_4: lambda: peers.flash_attention_4(q, k, v, cu_seqlens, max_seqlen, causal),
        **{impl: ours(impl) for impl in peers.OURS},
    }
    num_scores = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    work = RequiredWork(tokens, nbytes(q, k, v, q), 4 * head_dim * heads * num_scores)
    return BenchmarkCase(work, make, expected=reference)


def ceiling(name: str, dtype: torch.dtype, device: torch.device, small: bool = False) -> BenchmarkCase:
    """What torch reaches on this device: "copy" and "read" of 2 GiB, or a "matmul" of size 8192."""
    size, side = (1 << 16, 64) if small else (1 << 31, 8192)
    if name == "matmul":
        left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
        return BenchmarkCase(RequiredWork(side, nbytes(left, right, left), 2 * side**3), {"torch": lambda: lambda: left @ right})
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    if name == "read":
        return BenchmarkCase(RequiredWork(0, size), {"torch": lambda: lambda: source.sum()})
    target = torch.empty_like(source)
    return BenchmarkCase(RequiredWork(0, 2 * size), {"torch": lambda: lambda: target.copy_(source)})
