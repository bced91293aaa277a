"""Calls of every public operator for tests."""

import torch

import keye_kernels as kk


def rope_3d_arguments(dtype=torch.float32, tokens=7, norm=False):
    torch.manual_seed(0)
    q, k = torch.randn(tokens, 4, 16, dtype=dtype), torch.randn(tokens, 2, 16, dtype=dtype)
    inv_freq = 1e4 ** -(torch.arange(8) / 8)
    weights = {"q_norm_weight": torch.rand(16) + 0.5, "k_norm_weight": torch.rand(16) + 0.5} if norm else {}
    return (q, k, torch.randint(0, 50, (3, tokens)), inv_freq, [2, 3, 3]), weights


def projection_arguments(tokens=16, channels=8, after_merge=False, dtype=torch.float32):
    torch.manual_seed(0)
    norm = channels * 4 if after_merge else channels
    sizes = (norm,), (norm,), (24, channels * 4), (24,), (12, 24), (12,)
    return [torch.randn(tokens, channels, dtype=dtype), *(torch.randn(size, dtype=dtype) for size in sizes)]


def cases():
    """(name, operator, arguments, keyword arguments) for every operator and option."""
    for norm in (False, True):
        arguments, weights = rope_3d_arguments(torch.float64, norm=norm)
        yield f"rope_3d-norm{norm}", kk.ops.rope_3d, arguments, weights
    q = torch.randn(9, 2, 8, dtype=torch.float64)
    yield "rope_2d", kk.ops.rope_2d, (q, q.clone(), torch.randint(0, 9, (2, 9)), torch.rand(2)), {}
    qkv = torch.randn(3, 11, 2, 8, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 4, 4, 11], dtype=torch.int32)
    for causal, lse in ((False, False), (True, True)):
        keywords = {"causal": causal, "return_lse": lse}
        yield f"attention-causal{causal}-lse{lse}", kk.ops.varlen_attention, (*qkv.unbind(0), cu_seqlens, 7), keywords
    grid = torch.tensor([[1, 4, 2], [2, 2, 2]])
    for after_merge in (False, True):
        features, *weights = projection_arguments(after_merge=after_merge, dtype=torch.float64)
        yield f"projection-after{after_merge}", kk.ops.patch_merge_projection, (features, grid, *weights), {}
    table = torch.randn(9, 8, dtype=torch.float64)
    x, residual, up = torch.randn(3, 5, 8, dtype=torch.float64).unbind(0)
    norm_weight, bias = torch.rand(2, 8, dtype=torch.float64).unbind(0)
    yield "add-layer-norm", kk.ops.add_norm, (x, residual, norm_weight, bias), {}
    yield "rms-norm", kk.ops.add_norm, (x, None, norm_weight), {}
    yield "silu-mul", kk.ops.silu_mul, (x.clone(), up), {}
    weight, residual = torch.randn(6, 8, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    few_rows = x.clone(), weight, torch.randn(6, dtype=torch.float64)
    yield "few-rows", kk.ops.linear_few_rows, few_rows, {"residual": residual}
    yield "few-rows-silu-mul", kk.ops.linear_few_rows, few_rows[:2], {"silu_mul": True}
    yield "positions", kk.ops.position_embedding_2d, (features, table, grid), {}


CASES = list(cases())
IDS = [case[0] for case in CASES]


def needs_gradient(x):
    return isinstance(x, torch.Tensor) and x.dtype == torch.float64
