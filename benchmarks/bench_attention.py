"""Packed attention: the tower's (16 heads of 72, pictures and frames) and a prompt's (32 + 8 heads of 128, causal)."""

import pytest
import torch

import keye_kernels as kk
from keye_kernels.geometry import cumulative

from . import baseline, peers
from .measuring import Work, nbytes
from .shapes import MIXED

# Lengths of the segments, query heads, key heads, head dim, causal
REAL = {
    "1_image_1024": ([1024], 16, 16, 72, False),
    "16_images_mixed": ([h * w for _, h, w in MIXED], 16, 16, 72, False),
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
    impls=["official", "compiled", "sdpa", "torch_flash", "flash_attn", *peers.OURS], real=REAL, smoke=SMOKE
)
def test_varlen_attention(measure, impl, size, dtype, device, request):
    lengths, heads, kv_heads, head_dim, causal = size
    tokens, dtype = sum(lengths), getattr(torch, dtype)
    torch.manual_seed(0)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype, device=device)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    cu_seqlens, max_seqlen = cumulative(lengths).to(device), max(lengths)
    offsets = cu_seqlens.tolist()

    def official(q, k, v):
        return baseline.attend_segments(q, k, v, offsets, causal=causal)

    def make():
        if impl == "official":
            return lambda: official(q, k, v)
        if impl == "compiled":
            if len(set(lengths)) > 4 or len(lengths) > 16:
                raise peers.Unavailable(
                    f"compiled: the loop over {len(lengths)} segments would be unrolled into one graph"
                )
            return peers.compiled(official, q, k, v, smoke=request.config.getoption("benchmark_disable"))
        if impl == "sdpa":
            return lambda: peers.sdpa_segments(q, k, v, offsets, causal)
        if impl == "torch_flash":
            return peers.torch_flash(q, k, v, cu_seqlens, max_seqlen, causal)
        if impl == "flash_attn":
            return peers.flash_attention(q, k, v, cu_seqlens, max_seqlen, causal)
        peers.check_ours(impl, device)
        return lambda: kk.ops.varlen_attention(q, k, v, cu_seqlens, max_seqlen, causal=causal, impl=impl)

    expected = kk.ops.varlen_attention(
        q.float(), k.float(), v.float(), cu_seqlens, max_seqlen, causal=causal, impl="reference"
    )
    scores = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    measure(make, expected, Work(tokens, nbytes(q, k, v, q), 4 * head_dim * heads * scores))
