"""q/k norm with 3D rope (decoder), and 2D rope (vision tower)."""

import pytest
import torch

import keye_kernels as kk
from keye_kernels.tools.timing import baseline, peers
from keye_kernels.tools.timing.measuring import RequiredWork, nbytes
from keye_kernels.tools.timing.shapes import IMAGE_GRIDS, SMALL_IMAGE_GRIDS, num_patches, text_positions

SECTIONS, EPS = [16, 24, 24], 1e-6
# Tokens, query heads, key heads
REAL = {"decode_1": (1, 32, 8), "decode_8": (8, 32, 8), "1k": (1024, 32, 8), "8k": (8192, 32, 8), "32k": (32768, 32, 8)}
SMOKE = {"3": (3, 4, 2), "64": (64, 4, 2)}


@pytest.mark.benchmark(group="rope_3d")
@pytest.mark.cases(impls=[peers.OFFICIAL, peers.COMPILED, peers.LIGER, *peers.OURS], real=REAL, smoke=SMOKE)
def test_rope_3d(measure, impl, size, dtype, device, is_timed):
    tokens, heads, kv_heads = size
    dtype = getattr(torch, dtype)
    torch.manual_seed(0)
    # As in a layer: views of one fused projection
    qkv = torch.randn(tokens, heads + 2 * kv_heads, 128, dtype=dtype, device=device)
    q, k = qkv[:, :heads], qkv[:, heads : heads + kv_heads]
    q_weight, k_weight = (1 + 0.1 * torch.randn(2, 128, device=device)).to(dtype)
    positions = text_positions(tokens).to(device)
    inv_freq = 1e6 ** -(torch.arange(64, device=device) / 64)
    # The official code computes the tables once per forward pass, so they are not part of a layer's time
    tables = baseline.text_tables(positions[:, None], inv_freq, dtype)

    def official(q, k):
        q, k = baseline.rms_norm(q, q_weight, EPS), baseline.rms_norm(k, k_weight, EPS)
        rotated = baseline.rotate_text(*(x[None].transpose(1, 2) for x in (q, k)), *tables, SECTIONS)
        return tuple(x.transpose(1, 2)[0] for x in rotated)

    def rope(q, k, q_weight, k_weight, impl):
        norms = {"q_norm_weight": q_weight, "k_norm_weight": k_weight, "eps": EPS}
        return kk.ops.rope_3d(q, k, positions, inv_freq, SECTIONS, **norms, impl=impl)

    def make():
        if impl == peers.OFFICIAL:
            return lambda: official(q, k)
        if impl == peers.COMPILED:
            return peers.compiled(official, q, k, is_timed=is_timed)
        if impl == peers.LIGER:
            return peers.liger_rope_3d(q, k, q_weight, k_weight, tables, SECTIONS, EPS)
        peers.check_ours(impl, device)
        return lambda: rope(q, k, q_weight, k_weight, impl)

    expected = rope(*(x.float() for x in (q, k, q_weight, k_weight)), "reference")
    measure(make, expected, RequiredWork(tokens, 2 * nbytes(q, k) + nbytes(positions, inv_freq, q_weight, k_weight)))


@pytest.mark.benchmark(group="rope_2d")
@pytest.mark.cases(
    impls=[peers.OFFICIAL, peers.COMPILED, peers.FLASH_ATTN, *peers.OURS], real=IMAGE_GRIDS, smoke=SMALL_IMAGE_GRIDS
)
def test_rope_2d(measure, impl, size, dtype, device, is_timed):
    tokens = num_patches(size)
    torch.manual_seed(0)
    qkv = torch.randn(tokens, 3, 16, 72, dtype=getattr(torch, dtype), device=device)
    q, k = qkv[:, 0], qkv[:, 1]
    positions = baseline.grid_positions(size, device)
    inv_freq = 1e4 ** -(torch.arange(18, device=device) / 18)
    tables = baseline.vision_tables(positions, inv_freq)

    def make():
        if impl == peers.OFFICIAL:
            return lambda: baseline.rotate_vision(q, k, *tables)
        if impl == peers.COMPILED:
            return peers.compiled(baseline.rotate_vision, q, k, *tables, is_timed=is_timed)
        if impl == peers.FLASH_ATTN:
            return peers.flash_rope_2d(q, k, tables)
        peers.check_ours(impl, device)
        return lambda: kk.ops.rope_2d(q, k, positions, inv_freq, impl=impl)

    expected = kk.ops.rope_2d(q.float(), k.float(), positions, inv_freq, impl="reference")
    measure(make, expected, RequiredWork(tokens, 2 * nbytes(q, k) + nbytes(positions, inv_freq)))
