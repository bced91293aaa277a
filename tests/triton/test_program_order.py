"""What each program of a launch computes. The results do not depend on the order, but what programs share in L2 does."""

import inspect

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from keye_kernels.triton import varlen_attention as attention_module
from keye_kernels.triton.device import INTERPRETER_ARCH
from keye_kernels.triton.launch import Kernel
from keye_kernels.triton.linear import linear
from keye_kernels.triton.registry import kernel_specs
from keye_kernels.triton.varlen_attention import varlen_attention

ATTENTION_CONFIG = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1, "use_tma": False}
LINEAR_CONFIG = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1, "use_tma": False}


@pytest.fixture
def run_program(monkeypatch):
    """A function that makes launches run one program, with this index."""

    def choose(index):
        handle = TensorHandle(np.array([index], dtype=np.int32), tl.int32)
        monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", lambda self, axis: handle)

    def launch(kernel, grid, *arguments, **options):
        kernel.function[1,](*arguments, **options)

    monkeypatch.setattr(Kernel, "_launch", launch)
    return choose


def attention_programs(run_program, monkeypatch, causal, count, **options):
    """(heads, first tokens of tiles) that each program writes; two segments of 40 and 20 tokens, four heads."""
    monkeypatch.setattr(attention_module, "heads_per_l2_group", lambda *_: 2)
    q = torch.ones(60, 4, 8)
    cu_seqlens, found = torch.tensor([0, 40, 60], dtype=torch.int32), []
    for index in range(count):
        run_program(index)
        out, _ = varlen_attention(q, q, q, cu_seqlens, 40, 0.3, causal, False, config=ATTENTION_CONFIG, **options)
        tokens, heads, _ = out.nonzero(as_tuple=True)
        found.append((sorted(set(heads.tolist())), int(tokens.min()) if len(tokens) else None))
    return found


@pytest.mark.parametrize("causal", [False, True])
def test_two_heads_go_through_all_tiles_before_the_next_two(causal, run_program, monkeypatch):
    schedule = torch.tensor([[0, 40, 0], [0, 40, 16], [40, 20, 0]], dtype=torch.int32)
    found = attention_programs(run_program, monkeypatch, causal, 12, schedule=schedule)
    assert found == [([first + head], token) for first in (0, 2) for token in (0, 16, 40) for head in (0, 1)]


@pytest.mark.parametrize("causal", [False, True])
def test_without_a_schedule_the_last_causal_tiles_start_first(causal, run_program, monkeypatch):
    # 60 // 16 + 2 tiles, one of them without work
    found = attention_programs(run_program, monkeypatch, causal, 10)
    tiles = [token for (_, token) in found[::2]]
    expected = [0, 16, 32, 40, 56]
    assert tiles == (expected[::-1] if causal else expected)


def test_eight_row_blocks_share_the_columns_of_a_weight(run_program, monkeypatch):
    x, weight, bias = torch.ones(10 * 16, 16), torch.ones(64, 16), torch.ones(64)
    found = []
    for index in range(20):
        run_program(index)
        monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *shape, **options: torch.zeros(shape, **options))
        rows, columns = linear(x, weight, bias, backend="triton", config=LINEAR_CONFIG).nonzero(as_tuple=True)
        found.append((int(rows.min()) // 16, int(columns.min()) // 32))
    first, second = found[:16], found[16:]
    assert first == [(row, column) for column in (0, 1) for row in range(8)]
    assert second == [(row, column) for column in (0, 1) for row in (8, 9)]


def test_float32_matmuls_are_not_rounded_to_tf32(monkeypatch):
    """The interpreter multiplies in float32 whatever the precision says; tensor cores would not."""
    precisions, dot = [], InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, input_precision, *rest):
        precisions.append(input_precision)
        return dot(self, a, b, d, input_precision, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    q, cu_seqlens = torch.randn(40, 1, 72), torch.tensor([0, 40], dtype=torch.int32)
    varlen_attention(q, q, q, cu_seqlens, 40, 0.3, False, False)
    count = len(precisions)
    assert count >= 8  # with and without a mask, main part and tail, QK and PV
    linear(torch.randn(16, 16), torch.randn(32, 16), torch.randn(32), backend="triton", config=LINEAR_CONFIG)
    assert len(precisions) > count and len(set(precisions)) == 1
    assert str(precisions[0]).rpartition(".")[2].upper() == "IEEE"


def test_integers_are_not_specialized():
    """`Kernel` reuses a compiled kernel for other integers, so no integer may be assumed to be 1 or divisible by 16."""
    for spec in kernel_specs():
        for variant in spec.shipped_variants(INTERPRETER_ARCH):
            integers = {name for name, value in variant.signature.items() if value in ("i32", "i64")}
            source = inspect.getsource(variant.kernel.fn)
            listed = source[source.index("do_not_specialize") : source.index("def ")]
            assert integers and all(f'"{name}"' in listed for name in integers), variant.label
