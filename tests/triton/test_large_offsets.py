"""Offsets of 2**31 elements and more. Tensors are virtual memory of which only the used pages exist; one program runs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from keye_kernels import reference
from keye_kernels.triton.add_norm import add_norm_kernel
from keye_kernels.triton.linear import linear_kernel
from keye_kernels.triton.linear_few_rows_kernel import linear_few_rows_kernel
from keye_kernels.triton.patch_merge_norm import patch_merge_norm_kernel
from keye_kernels.triton.position_embedding_2d import position_embedding_2d_kernel
from keye_kernels.triton.rope import rope_kernel
from keye_kernels.triton.silu_mul import silu_mul_kernel
from keye_kernels.triton.varlen_attention import varlen_attention
from tests.helpers.packed import assert_same_bits

LIMIT, WIDTH, LAST = 2**31, 16, 16  # elements below the used rows, columns, used rows
FIRST = LIMIT // WIDTH
HALF = torch.float16
FP16 = {"atol": 4e-3, "rtol": 4e-3}  # a few roundings


@pytest.fixture
def only_program(monkeypatch):
    """A function that makes every launch run as the program of this index."""

    def choose(index):
        handle = TensorHandle(np.array([index], dtype=np.int32), tl.int32)
        monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", lambda self, axis: handle)

    return choose


def far_rows(width=WIDTH, seed=0):
    """A tensor whose last LAST rows start at 2**31 elements, and a copy of these rows."""
    x = torch.empty(LIMIT // width + LAST, width, dtype=HALF)
    x[-LAST:] = torch.randn(LAST, width, generator=torch.Generator().manual_seed(seed))
    return x, x[-LAST:].clone()


def test_linear(only_program):
    (x, rows), (out, _) = far_rows(), far_rows()
    weight, bias = torch.randn(WIDTH, WIDTH).mul(0.25).half(), torch.randn(WIDTH).half()
    for gelu in (False, True):
        only_program(FIRST // 16)
        options = {"IN": WIDTH, "OUT": WIDTH, "GELU": gelu, "BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "GROUP_M": 8}
        linear_kernel[(1,)](out, x, weight, None, None, bias, len(x), **options)
        expected = F.linear(rows, weight, bias)
        torch.testing.assert_close(out[-LAST:], F.gelu(expected) if gelu else expected, **FP16)


@pytest.mark.parametrize("slices", [0, 1])
def test_linear_of_few_rows(slices, only_program):
    """Its weight is far, and `up` starts at 2**31 elements."""
    x, (weight, rows) = torch.randn(8, WIDTH).half(), far_rows()
    out = torch.empty(8, len(weight), dtype=HALF)
    only_program(FIRST // 16)
    options = {"IN": WIDTH, "USE_PDL": False, "BLOCK_T": 8, "BLOCK_N": 16, "BLOCK_K": 16, "SLICES": slices}
    linear_few_rows_kernel[(1,)](out, x, weight, None, None, 8, OUT=len(weight), SILU_MUL=False, **options)
    torch.testing.assert_close(out[:, -LAST:], F.linear(x, rows), **FP16)
    only_program(0)
    weight = torch.empty(2 * FIRST, WIDTH, dtype=HALF)
    weight[:16], weight[FIRST : FIRST + 16] = rows, rows.flip(0)
    linear_few_rows_kernel[(1,)](out, x, weight, None, None, 8, OUT=FIRST, SILU_MUL=True, **options)
    expected = F.silu(F.linear(x, rows)) * F.linear(x, rows.flip(0))
    torch.testing.assert_close(out.view(-1)[: 8 * FIRST].view(8, FIRST)[:, :16], expected, **FP16)


@pytest.mark.parametrize("gathered", [False, True])
def test_patch_merge_norm(gathered, only_program):
    (features, rows), (out, _) = far_rows(4), far_rows(16)
    weight, bias = torch.randn(4).half(), torch.randn(4).half()
    first = LIMIT // 16
    only_program(first // 4)
    index = None
    if gathered:
        index = torch.empty(first + 4, 4, dtype=torch.int32)
        index[-4:] = LIMIT // 4 + torch.arange(16, dtype=torch.int32).view(4, 4).flip(0)
    options = {"PATCHES": 4, "CHANNELS": 4, "STRIDE": 4, "NORM_WIDTH": 4, "BLOCK_M": 4, "BLOCK_K": 4}
    patch_merge_norm_kernel[(1,)](out, features, weight, bias, index, first + 4, 1e-5, **options)
    expected = F.layer_norm(rows, (4,), weight, bias, 1e-5).view(4, 16)
    torch.testing.assert_close(out[first : first + 4], expected.flip(0) if gathered else expected, **FP16)


def test_position_embeddings(only_program):
    (features, rows), (out, _) = far_rows(), far_rows()
    index, weight = torch.empty(len(features), 4, dtype=torch.int32), torch.empty(len(features), 4)
    index[-LAST:], weight[-LAST:] = torch.randint(0, 9, (LAST, 4)).int(), torch.rand(LAST, 4)
    table = torch.randn(9, WIDTH).half()
    only_program(FIRST // 4)
    options = {"CHANNELS": WIDTH, "STRIDE_UNIT": 8, "BLOCK_T": 4, "BLOCK_C": 16}
    position_embedding_2d_kernel[(1,)](out, features, table, index, weight, len(features), WIDTH // 8, **options)
    expected = reference.position_embedding_2d(rows, table, index[-LAST:], weight[-LAST:])
    torch.testing.assert_close(out[FIRST : FIRST + 4], expected[:4], **FP16)


def test_add_norm(only_program):
    (x, rows), (residual, others), (total, _), (normed, _) = (far_rows(seed=seed) for seed in range(4))
    weight, bias = torch.randn(WIDTH).half(), torch.randn(WIDTH).half()
    only_program(FIRST // 4)
    options = {"CHANNELS": WIDTH, "STRIDE_UNIT": 8, "BLOCK_T": 4, "BLOCK_C": WIDTH}
    strides = (WIDTH // 8, WIDTH // 8)
    add_norm_kernel[(1,)](total, normed, x, residual, weight, bias, len(x), 1e-5, *strides, **options)
    expected = reference.add_norm(rows, others, weight, bias, 1e-5)
    for out, exact in zip((total, normed), expected, strict=True):
        torch.testing.assert_close(out[FIRST : FIRST + 4], exact[:4], **FP16)


def test_silu_mul(only_program):
    (gate, rows), (up, others), (out, _) = (far_rows(seed=seed) for seed in range(3))
    only_program(FIRST // 4)
    options = {"CHANNELS": WIDTH, "STRIDE_UNIT": 8, "BLOCK_T": 4, "BLOCK_C": WIDTH}
    silu_mul_kernel[(1,)](out, gate, up, len(gate), WIDTH // 8, WIDTH // 8, **options)
    torch.testing.assert_close(out[FIRST : FIRST + 4], reference.silu_mul(rows, others)[:4], **FP16)


def test_rope(only_program):
    (q, rows), (out, _) = far_rows(), far_rows()
    positions, inv_freq = torch.tensor([[7]]).expand(1, len(q)), torch.rand(8)
    only_program(FIRST // 4)
    options = {
        "Q_HEADS": 1, "K_HEADS": 0, "HEAD_DIM": WIDTH, "NUM_FREQUENCIES": 8, "SECTIONS": (8,), "CONJUGATE": False,
        "STRIDE_UNIT": 8, "INT64_OFFSETS": False, "PAIRS": 8, "TAIL": 0, "VECTOR": 8, "BLOCK_T": 4, "BLOCK_H": 1,
    }  # fmt: skip
    tensors = out, out, None, q, q, None, None, None, inv_freq, positions, None
    rope_kernel[(1,)](*tensors, len(q), 1e-6, *[2] * 4, 0, 0, 0, 0, 0, 0, **options)
    expected, _ = reference.rope(rows[:4, None], rows[:4, None], torch.full((1, 4), 7), inv_freq, [8])
    torch.testing.assert_close(out[FIRST : FIRST + 4], expected[:, 0], **FP16)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_tokens_far_into_a_batch(causal):
    q, k, v = (far_rows(seed=seed) for seed in range(3))
    schedule = torch.tensor([[FIRST, LAST, 0]], dtype=torch.int32)
    offsets = torch.tensor([0, FIRST, FIRST + LAST], dtype=torch.int32)
    arguments = offsets, LAST, 0.25, causal, False, schedule, True
    out, _ = varlen_attention(*(x[:, None] for x, _ in (q, k, v)), *arguments)
    near = (rows[:, None] for _, rows in (q, k, v))
    expected, _ = varlen_attention(*near, torch.tensor([0, LAST], dtype=torch.int32), LAST, 0.25, causal, False)
    assert_same_bits([out[-LAST:]], [expected])


@pytest.mark.parametrize("position", range(3), ids=["q", "k", "v"])
def test_attention_of_heads_far_apart(position):
    tensors = list(torch.randn(3, LAST, 2, 8).half().unbind(0))
    expected, _ = varlen_attention(*tensors, torch.tensor([0, LAST], dtype=torch.int32), LAST, 0.25, False, False)
    far = torch.empty(LIMIT + LAST * 8, dtype=HALF).as_strided((LAST, 2, 8), (8, LIMIT, 1))
    tensors[position] = far.copy_(tensors[position])
    out, _ = varlen_attention(*tensors, torch.tensor([0, LAST], dtype=torch.int32), LAST, 0.25, False, False)
    assert_same_bits([out], [expected])
