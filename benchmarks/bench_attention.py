"""Varlen attention: of the vision tower (16 heads of 72) and of the decoder (32 query and 8 key heads of 128, causal)."""

import pytest
import torch

import keye_kernels as kk
from keye_kernels.segments import Segments
from keye_kernels.tools.timing import baseline, peers
from keye_kernels.tools.timing.measuring import RequiredWork, nbytes
from keye_kernels.tools.timing.shapes import MIXED_GRIDS

# Segment lengths, query heads, key heads, head dim, causal
REAL = {
    "1_image_1024": ([1024], 16, 16, 72, False),
    "16_images_mixed": ([h * w for _, h, w in MIXED_GRIDS], 16, 16, 72, False),
    "ragged_576_252_112_84": ([576, 252, 112, 84], 16, 16, 72, False),
    "1_image_5120": ([5120], 16, 16, 72, False),
    "64_frames_448": ([448] * 64, 16, 16, 72, False),
    "video_768_frames_slow_fast": ([448, *[112] * 5] * 128, 16, 16, 72, False),
    "prompt_1k": ([1024], 32, 8, 128, True),
    "prompt_8k": ([8192], 32, 8, 128, True),
}
SMOKE = {
    "1_image_64": ([64], 2, 2, 72, False),
    "ragged_24_16_9": ([24, 16, 9], 2, 2, 72, False),
    "prompt_48": ([48], 4, 2, 128, True),
}


@pytest.mark.benchmark(group="varlen_attention")
@pytest.mark.cases(
    impls=[peers.OFFICIAL, peers.COMPILED, peers.SDPA, peers.TORCH_FLASH, peers.FLASH_ATTN, *peers.OURS],
    real=REAL,
    smoke=SMOKE,
)
def test_varlen_attention(measure, impl, size, dtype, device, is_timed):
    lengths, heads, kv_heads, head_dim, causal = size
    tokens, dtype = sum(lengths), getattr(torch, dtype)
    torch.manual_seed(0)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype, device=device)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    segments = Segments.from_lengths(lengths, device)  # layers share it, so its tile schedule is not part of the call
    cu_seqlens, max_seqlen = segments.cu_seqlens, segments.max_seqlen
    offsets = cu_seqlens.tolist()

    def official(q, k, v):
        return baseline.attend_segments(q, k, v, offsets, causal=causal)

    def make():
        if impl == peers.OFFICIAL:
            return lambda: official(q, k, v)
        if impl == peers.COMPILED:
            return peers.compiled(official, q, k, v, is_timed=is_timed, loop_iterations=len(lengths))
        if impl == peers.SDPA:
            return lambda: peers.sdpa_segments(q, k, v, offsets, causal)
        if impl == peers.TORCH_FLASH:
            return peers.torch_flash(q, k, v, cu_seqlens, max_seqlen, causal)
        if impl == peers.FLASH_ATTN:
            return peers.flash_attention(q, k, v, cu_seqlens, max_seqlen, causal)
        peers.check_ours(impl, device)
        return lambda: kk.ops.varlen_attention(q, k, v, segments, max_seqlen, causal=causal, impl=impl)

    expected = kk.ops.varlen_attention(q.float(), k.float(), v.float(), cu_seqlens, max_seqlen, causal=causal, impl="reference")
    num_scores = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    measure(make, expected, RequiredWork(tokens, nbytes(q, k, v, q), 4 * head_dim * heads * num_scores))
