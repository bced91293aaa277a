"""q/k norm with 3D rope (text model), and 2D rope (tower)."""

import pytest
import torch

import keye_kernels as kk

from . import baseline, peers
from .measuring import Work, nbytes
from .shapes import PICTURES, SMALL_PICTURES, num_patches, text_positions

SECTIONS, EPS = [16, 24, 24], 1e-6
# Tokens, query heads, key heads
REAL = {"decode_1": (1, 32, 8), "decode_8": (8, 32, 8), "1k": (1024, 32, 8), "8k": (8192, 32, 8), "32k": (32768, 32, 8)}
SMOKE = {"3": (3, 4, 2), "64": (64, 4, 2)}


@pytest.mark.benchmark(group="rope_3d")
@pytest.mark.cases(impls=["official", "compiled", "liger", *peers.OURS], real=REAL, smoke=SMOKE)
def test_rope_3d(measure, impl, size, dtype, device, request):
    tokens, heads, kv_heads = size
    dtype = getattr(torch, dtype)
    torch.manual_seed(0)
    # As the layer holds them: views of one fused product
    qkv = torch.randn(tokens, heads + 2 * kv_heads, 128, dtype=dtype, device=device)
    q, k = qkv[:, :heads], qkv[:, heads : heads + kv_heads]
    q_weight, k_weight = (1 + 0.1 * torch.randn(2, 128, device=device)).to(dtype)
    positions = text_positions(tokens).to(device)
    inv_freq = 1e6 ** -(torch.arange(64, device=device) / 64)
    # The official code makes its tables once a forward pass, so they are no part of a layer's time
    tables = baseline.text_tables(positions[:, None], inv_freq, dtype)

    def official(q, k):
        q, k = baseline.rms_norm(q, q_weight, EPS), baseline.rms_norm(k, k_weight, EPS)
        turned = baseline.rotate_text(*(x[None].transpose(1, 2) for x in (q, k)), *tables, SECTIONS)
        return tuple(x.transpose(1, 2)[0] for x in turned)

    def rope(q, k, q_weight, k_weight, impl):
        norms = {"q_norm_weight": q_weight, "k_norm_weight": k_weight, "eps": EPS}
        return kk.ops.rope_3d(q, k, positions, inv_freq, SECTIONS, **norms, impl=impl)

    def make():
        if impl == "official":
            return lambda: official(q, k)
        if impl == "compiled":
            return peers.compiled(official, q, k, smoke=request.config.getoption("benchmark_disable"))
        if impl == "liger":
            return peers.liger_rope_3d(q, k, q_weight, k_weight, tables, SECTIONS, EPS)
        peers.check_ours(impl, device)
        return lambda: rope(q, k, q_weight, k_weight, impl)

    expected = rope(*(x.float() for x in (q, k, q_weight, k_weight)), "reference")
    measure(make, expected, Work(tokens, 2 * nbytes(q, k) + nbytes(positions, inv_freq, q_weight, k_weight)))


@pytest.mark.benchmark(group="rope_2d")
@pytest.mark.cases(impls=["official", "compiled", "flash_attn", *peers.OURS], real=PICTURES, smoke=SMALL_PICTURES)
def test_rope_2d(measure, impl, size, dtype, device, request):
    tokens = num_patches(size)
    torch.manual_seed(0)
    qkv = torch.randn(tokens, 3, 16, 72, dtype=getattr(torch, dtype), device=device)
    q, k = qkv[:, 0], qkv[:, 1]
    positions = baseline.grid_positions(size, device)
    inv_freq = 1e4 ** -(torch.arange(18, device=device) / 18)
    tables = baseline.vision_tables(positions, inv_freq)

    def make():
        if impl == "official":
            return lambda: baseline.rotate_vision(q, k, *tables)
        if impl == "compiled":
            smoke = request.config.getoption("benchmark_disable")
            return peers.compiled(baseline.rotate_vision, q, k, *tables, smoke=smoke)
        if impl == "flash_attn":
            return peers.flash_rope_2d(q, k, tables)
        peers.check_ours(impl, device)
        return lambda: kk.ops.rope_2d(q, k, positions, inv_freq, impl=impl)

    expected = kk.ops.rope_2d(q.float(), k.float(), positions, inv_freq, impl="reference")
    measure(make, expected, Work(tokens, 2 * nbytes(q, k) + nbytes(positions, inv_freq)))
