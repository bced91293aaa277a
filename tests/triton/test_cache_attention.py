"""The kernels of attention to a key/value cache, in the interpreter: values, masks, splits, offsets, memory traffic."""

import pytest
import torch

from keye_kernels import reference
from keye_kernels.tools.bench.traffic import count_traffic
from keye_kernels.triton import cache_attention as module
from keye_kernels.triton.cache_attention import cache_attention, num_splits
from keye_kernels.triton.device import Arch

FP32 = {"atol": 3e-6, "rtol": 1e-5}
CONFIG = {"BLOCK_N": 16, "num_warps": 4, "num_stages": 2}


def make(batch=2, num_new=1, used=70, slots=100, heads=4, key_heads=2, head_dim=32, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    valid = torch.rand(batch, slots, generator=generator) > 0.2
    caches = [normal(batch, slots, key_heads, head_dim) for _ in range(2)]
    q = normal(batch * num_new, heads, head_dim)
    return [q, *caches, valid, torch.arange(used - num_new, used)]


def expected(arguments, scale=0.3):
    q, keys, values, *rest = arguments
    return reference.cache_attention(q.double(), keys.double(), values.double(), *rest, scale)


SHAPES = {
    "one token": {},
    "several tokens": {"num_new": 5},
    "one sequence": {"batch": 1, "used": 100},
    "many heads of a group": {"heads": 32, "key_heads": 2},
    "one head": {"heads": 1, "key_heads": 1, "head_dim": 8},
    "head dim 72": {"head_dim": 72, "batch": 1},
    "head dim 256": {"head_dim": 256, "batch": 1, "used": 40},
    "first slot": {"used": 1},
    "a prompt": {"num_new": 40, "used": 40, "batch": 1},
    "more rows than a program has": {"num_new": 40, "heads": 4, "key_heads": 1, "batch": 1},
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("config", [None, CONFIG], ids=["heuristic", "BLOCK_N 16"])
def test_fp32_matches_float64(name, config, poisoned_empty):
    arguments = make(**SHAPES[name])
    found = cache_attention(*arguments, 0.3, config)
    torch.testing.assert_close(found.double(), expected(arguments), **FP32)


@pytest.mark.parametrize("multiprocessors", [1, 4, 132])
def test_the_number_of_parts_changes_the_rounding_only(multiprocessors, monkeypatch):
    monkeypatch.setattr(module, "device_arch", lambda device: Arch("sm_90", multiprocessors))
    arguments = make(batch=1, used=90, num_new=2)
    torch.testing.assert_close(cache_attention(*arguments, 0.3, CONFIG).double(), expected(arguments), **FP32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_half_precision_is_within_its_rounding(dtype):
    arguments = make(dtype=dtype, num_new=3)
    found = cache_attention(*arguments, 0.3)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected(arguments), atol=2e-3, rtol=2e-3)


def test_what_is_not_valid_or_after_the_token_is_not_used():
    """NaN there would reach every output."""
    arguments = make(num_new=3, used=60)
    _, keys, values, valid, _ = arguments
    exact = expected(arguments)
    for cache in (keys, values):
        cache[~valid] = torch.nan
        cache[:, 60:] = torch.nan
    torch.testing.assert_close(cache_attention(*arguments, 0.3).double(), exact, **FP32)


def test_large_scores_do_not_overflow():
    arguments = make(used=60)
    arguments[0] *= 300
    torch.testing.assert_close(cache_attention(*arguments, 1.0).double(), expected(arguments, 1.0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(cache_attention(*arguments, -1.0).double(), expected(arguments, -1.0), atol=1e-4, rtol=1e-4)


def test_a_token_without_a_valid_slot_gets_zeros(poisoned_empty):
    arguments = make(num_new=2)
    arguments[3][0] = False
    found = cache_attention(*arguments, 0.3)
    assert not found[:2].any() and found[2:].any(dim=-1).all()
    torch.testing.assert_close(found.double(), expected(arguments), **FP32)


def test_slots_are_read_when_the_kernel_runs():
    """One CUDA graph serves a cache of any fill."""
    arguments = make(used=100)
    run = module.prepare(arguments[0], arguments[1], arguments[4], 0.3)
    for used in (100, 3, 50):
        arguments[4].fill_(used - 1)
        torch.testing.assert_close(run(*arguments).double(), expected(arguments), **FP32)


def test_a_slot_out_of_range_reads_nothing_out_of_range():
    arguments = make(used=100)
    exact = expected(arguments)
    arguments[4].fill_(10**12)
    torch.testing.assert_close(cache_attention(*arguments, 0.3).double(), exact, **FP32)


@pytest.mark.parametrize("used", [32, 512])
def test_memory_traffic_depends_on_the_used_slots(used):
    arguments = make(batch=1, used=used, slots=4096, heads=8, key_heads=2, dtype=torch.float16)
    with count_traffic() as traffic:
        cache_attention(*arguments, 0.3)
    # Keys and values, each read once, and parts that are written and read
    assert len(traffic.launches) == 2
    keys_and_values = 2 * used * 2 * 32 * 2
    assert keys_and_values < traffic.unique < keys_and_values + 64 * 8 * (32 + 2) * 4 * 2 + 5000


def test_the_result_does_not_depend_on_the_run():
    arguments = make(num_new=4)
    first = cache_attention(*arguments, 0.3)
    assert all(torch.equal(first, cache_attention(*arguments, 0.3)) for _ in range(3))


def test_strided_queries_and_no_tokens():
    arguments = make(heads=8, key_heads=2)
    whole = arguments[0]
    expected_half = expected([whole[:, :4].contiguous(), *arguments[1:]])
    torch.testing.assert_close(cache_attention(whole[:, :4], *arguments[1:], 0.3).double(), expected_half, **FP32)
    empty = make(batch=0)
    assert cache_attention(*empty, 0.3).shape == (0, 4, 32)


def test_as_many_parts_as_fill_the_gpu():
    sm_90, small = Arch("sm_90", 132), Arch("sm_86", 20)
    assert num_splits(8, sm_90) == 32  # 264 programs wanted: 33 parts for each of 8 heads
    assert num_splits(8 * 8, sm_90) == 4 and num_splits(8 * 64, sm_90) == 1
    assert num_splits(8, small) == 4 and num_splits(1, sm_90) == 64 and num_splits(0, sm_90) == 64
