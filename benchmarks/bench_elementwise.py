"""The work of a layer between its matmuls: residual add + norm, the gate of the MLP, and the rope that writes into the cache."""

import pytest
import torch
import torch.nn.functional as F

import keye_kernels as kk
from keye_kernels.tools.timing import baseline, peers
from keye_kernels.tools.timing.measuring import RequiredWork, nbytes
from keye_kernels.tools.timing.shapes import text_positions

SECTIONS, RMS_EPS, LAYER_EPS = [16, 24, 24], 1e-6, 1e-6
IMPLS = [peers.OFFICIAL, peers.COMPILED, peers.LIGER, *peers.OURS]
# Rows and channels
HIDDEN = {name: (tokens, 4096) for name, tokens in (("decode_1", 1), ("decode_8", 8), ("1k", 1024), ("8k", 8192))}
TOWER = {"1_image_1024": (1024, 1152), "16_images_mixed": (4096, 1152), "64_frames_448": (28672, 1152)}
INTERMEDIATE = {name: (tokens, 12288) for name, (tokens, _) in HIDDEN.items()}
SMOKE = {"3": (3, 64), "32": (32, 96)}
# Sequences, tokens per sequence, query heads, key heads
CACHED = {"decode_1": (1, 1, 32, 8), "decode_8": (8, 1, 32, 8), "1k": (1, 1024, 32, 8), "8k": (1, 8192, 32, 8)}
SMALL_CACHED = {"3": (1, 3, 4, 2), "batch_2_5": (2, 5, 4, 2)}


@pytest.mark.benchmark(group="add_norm, RMSNorm")
@pytest.mark.cases(impls=IMPLS, real=HIDDEN, smoke=SMOKE)
def test_add_rms_norm(measure, impl, size, dtype, device, is_timed):
    def official(x, residual, weight):
        total = residual + x
        return total, baseline.rms_norm(total, weight, RMS_EPS)

    torch.manual_seed(0)
    x, residual = torch.randn(2, *size, dtype=getattr(torch, dtype), device=device).unbind(0)
    weight = torch.rand(size[1], dtype=x.dtype, device=device) + 0.5
    _measure_norm(measure, impl, device, is_timed, official, peers.liger_add_rms_norm, (x, residual, weight), RMS_EPS)


@pytest.mark.benchmark(group="add_norm, LayerNorm")
@pytest.mark.cases(impls=IMPLS, real=TOWER, smoke=SMOKE)
def test_add_layer_norm(measure, impl, size, dtype, device, is_timed):
    def official(x, residual, weight, bias):
        total = residual + x
        return total, F.layer_norm(total, weight.shape, weight, bias, LAYER_EPS)

    torch.manual_seed(0)
    x, residual = torch.randn(2, *size, dtype=getattr(torch, dtype), device=device).unbind(0)
    weight, bias = (torch.rand(2, size[1], dtype=x.dtype, device=device) + 0.5).unbind(0)
    _measure_norm(measure, impl, device, is_timed, official, peers.liger_add_layer_norm, (x, residual, weight, bias), LAYER_EPS)


def _measure_norm(measure, impl, device, is_timed, official, liger, tensors, eps):
    def make():
        if impl == peers.OFFICIAL:
            return lambda: official(*tensors)
        if impl == peers.COMPILED:
            return peers.compiled(official, *tensors, is_timed=is_timed)
        if impl == peers.LIGER:
            return liger(*tensors, eps)
        peers.check_ours(impl, device)
        return lambda: kk.ops.add_norm(*tensors, eps=eps, impl=impl)

    expected = kk.ops.add_norm(*(x.float() for x in tensors), eps=eps, impl="reference")
    measure(make, expected, RequiredWork(len(tensors[0]), 2 * nbytes(*tensors[:2]) + nbytes(*tensors[2:])))


@pytest.mark.benchmark(group="silu_mul")
@pytest.mark.cases(impls=IMPLS, real=INTERMEDIATE, smoke=SMOKE)
def test_silu_mul(measure, impl, size, dtype, device, is_timed):
    def official(gate, up):
        return F.silu(gate) * up

    rows, channels = size
    torch.manual_seed(0)
    # As in a layer: views of one fused projection
    gate, up = torch.randn(rows, 2 * channels, dtype=getattr(torch, dtype), device=device).split(channels, dim=1)

    def make():
        if impl == peers.OFFICIAL:
            return lambda: official(gate, up)
        if impl == peers.COMPILED:
            return peers.compiled(official, gate, up, is_timed=is_timed)
        if impl == peers.LIGER:
            return peers.liger_silu_mul(gate, up)
        peers.check_ours(impl, device)
        return lambda: kk.ops.silu_mul(gate, up, impl=impl)

    measure(make, official(gate.float(), up.float()), RequiredWork(rows, 3 * nbytes(gate)))


@pytest.mark.benchmark(group="rope_3d_to_cache")
@pytest.mark.cases(impls=IMPLS, real=CACHED, smoke=SMALL_CACHED)
def test_rope_3d_to_cache(measure, impl, size, dtype, device, is_timed):
    """The peers rotate q and k, and copy k and v into the cache."""
    batch_size, length, heads, kv_heads = size
    tokens, dtype = batch_size * length, getattr(torch, dtype)
    torch.manual_seed(0)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, 128, dtype=dtype, device=device)
    q_weight, k_weight = (1 + 0.1 * torch.randn(2, 128, device=device)).to(dtype)
    positions = text_positions(length).repeat(1, batch_size).to(device)
    inv_freq = 1e6 ** -(torch.arange(64, device=device) / 64)
    tables = baseline.text_tables(positions[:, None], inv_freq, dtype)  # once per forward pass
    slots = torch.arange(length, device=device) + 8
    caches = torch.zeros(2, batch_size, length + 16, kv_heads, 128, dtype=dtype, device=device)

    def split(qkv):
        return qkv.split((heads, kv_heads, kv_heads), dim=1)

    def write(q, k, v, caches):
        for cache, new in zip(caches, (k, v), strict=True):
            cache.index_copy_(1, slots, new.unflatten(0, (batch_size, length)))
        return q, *caches

    def official(qkv, caches):
        q, k, v = split(qkv)
        q, k = baseline.rms_norm(q, q_weight, RMS_EPS), baseline.rms_norm(k, k_weight, RMS_EPS)
        rotated = baseline.rotate_text(*(x[None].transpose(1, 2) for x in (q, k)), *tables, SECTIONS)
        return write(*(x.transpose(1, 2)[0] for x in rotated), v, caches)

    def ours(qkv, weights, caches, impl):
        norms = {"q_norm_weight": weights[0], "k_norm_weight": weights[1], "eps": RMS_EPS}
        q = kk.ops.rope_3d_to_cache(*split(qkv), positions, inv_freq, SECTIONS, *caches, slots, **norms, impl=impl)
        return q, *caches

    def make():
        if impl == peers.OFFICIAL:
            return lambda: official(qkv, caches.unbind(0))
        if impl == peers.COMPILED:
            return peers.compiled(official, qkv, caches.unbind(0), is_timed=is_timed)
        if impl == peers.LIGER:
            q, k, v = split(qkv)
            rotate = peers.liger_rope_3d(q, k, q_weight, k_weight, tables, SECTIONS, RMS_EPS)
            return lambda: write(*rotate(), v, caches.unbind(0))
        peers.check_ours(impl, device)
        return lambda: ours(qkv, (q_weight, k_weight), caches.unbind(0), impl)

    expected = ours(qkv.float(), (q_weight.float(), k_weight.float()), caches.float().unbind(0), "reference")
    read_once = nbytes(positions, inv_freq, q_weight, k_weight, slots)
    measure(make, expected, RequiredWork(tokens, 2 * nbytes(qkv) + read_once))
