"""The traffic counter: bytes and FLOPs of small kernels with known counts."""

import numpy as np
import pytest
import torch

import keye_kernels as kk
from keye_kernels.tools.bench.traffic import ByteSet, count_traffic, tensor_bytes

triton = pytest.importorskip("triton")
tl = triton.language


@triton.jit
def copy_kernel(out_ptr, x_ptr, size, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) * BLOCK < size:
        tl.store(out_ptr + o, tl.load(x_ptr + o, mask=o < size, other=0.0), mask=o < size)


@triton.jit
def matmul_kernel(out_ptr, a_ptr, b_ptr, SIZE: tl.constexpr):
    o = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    out = tl.dot(tl.load(a_ptr + o), tl.load(b_ptr + o))
    tl.store(out_ptr + o, tl.dot(out, tl.load(b_ptr + o)))


@triton.jit
def sum_kernel(out_ptr, x_ptr, SIZE: tl.constexpr):
    tl.atomic_add(out_ptr + tl.arange(0, SIZE), tl.load(x_ptr + tl.arange(0, SIZE)))


def test_a_copy_moves_each_byte_once_and_its_last_programs_are_idle():
    x = torch.randn(100)
    with count_traffic() as traffic:
        copy_kernel[(5,)](torch.empty(100), x, 100, BLOCK=32)
    (launch,) = traffic.launches
    assert (launch.kernel, launch.programs, launch.idle_programs) == ("copy_kernel", 5, 1)
    assert (launch.loaded, launch.loaded_once, launch.stored, launch.stored_once) == (400, 400, 400, 400)
    assert traffic.eager_operators == [] and traffic.dot_flops == 0


def test_bytes_loaded_again_are_requested_twice_and_unique_once():
    a, b, out = torch.randn(3, 16, 16)
    with count_traffic() as traffic:
        matmul_kernel[(1,)](out, a, b, SIZE=16)
    (launch,) = traffic.launches
    assert (launch.loaded, launch.loaded_once, launch.stored_once) == (3 * 1024, 2 * 1024, 1024)
    assert launch.dot_flops == 2 * 2 * 16**3


def test_launches_do_not_share_a_cache():
    x, out = torch.randn(2, 64)
    with count_traffic() as traffic:
        for _ in range(3):
            copy_kernel[(1,)](out, x, 64, BLOCK=64)
    assert len(traffic.launches) == 3 and traffic.unique == traffic.requested == 3 * 2 * 256


def test_an_atomic_sum_reads_and_writes():
    x, out = torch.randn(2, 16)
    with count_traffic() as traffic:
        sum_kernel[(1,)](out, x, SIZE=16)
    (launch,) = traffic.launches
    assert (launch.loaded, launch.stored, launch.idle_programs) == (128, 64, 0)


def test_eager_operators_next_to_a_kernel_are_counted_and_views_are_not():
    x = torch.randn(64)
    with count_traffic() as traffic:
        copy_kernel[(1,)](torch.empty(64), x.view(8, 8).T, 64, BLOCK=64)
        x.half()
    assert traffic.eager_operators == ["_to_copy"] and traffic.eager_bytes == 256 + 128


def test_the_kernels_that_an_operator_launches_are_counted():
    (q, k), positions, frequencies = torch.randn(2, 6, 2, 16), torch.zeros(2, 6, dtype=torch.int32), torch.ones(4)
    with count_traffic() as traffic:
        kk.ops.rope_2d(q, k, positions, frequencies, impl="triton")
    assert len(traffic.launches) == 1 and traffic.eager_operators == []


def test_byte_sets_count_overlapping_scattered_and_repeated_addresses_once():
    generator = np.random.default_rng(0)
    found, expected = ByteSet(), set()
    for size in (1, 2, 4, 2):
        addresses = generator.integers(0, 400, 60).astype(np.uint64)
        found.add(addresses, size)
        expected |= {int(a) + byte for a in addresses for byte in range(size)}
        assert len(found) == len(expected)


def test_merging_early_changes_no_count(monkeypatch):
    monkeypatch.setattr("keye_kernels.tools.bench.traffic.MERGE_EVERY", 3)
    test_byte_sets_count_overlapping_scattered_and_repeated_addresses_once()


def test_an_expanded_tensor_is_stored_once():
    assert tensor_bytes(torch.zeros(3, 1).expand(3, 50), torch.zeros(0, 4), torch.zeros(2, dtype=torch.int8)) == 14


def test_triton_that_compiles_is_rejected(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), count_traffic():
        pass
