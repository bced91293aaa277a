"""The rope kernel that writes k and v into a cache, in the interpreter: values, slots, strides, offsets, memory traffic."""

import pytest
import torch

from keye_kernels import reference
from keye_kernels.tools.bench.traffic import count_traffic, tensor_bytes
from keye_kernels.triton.rope import rope, rope_to_cache
from tests.triton.test_rope import FP32, inverse_frequencies

FILL = 7.0  # of slots that are not written
TWO_SEQUENCES = {"batch": 2, "slots": (6, 0, 3)}


def make(head_dim=128, dtype=torch.float32, norm=True, batch=1, slots=(0, 1, 2, 3, 4), cache_slots=7, heads=(4, 2)):
    """Arguments of one call. q, k and v are views of one buffer, as in a layer."""
    torch.manual_seed(head_dim)
    tokens, half = batch * len(slots), head_dim // 2
    fused = torch.randn(tokens, heads[0] + 2 * heads[1], head_dim).to(dtype)
    q, k, v = fused.split((heads[0], heads[1], heads[1]), dim=1)
    arguments = {
        "q": q, "k": k, "v": v, "position_ids": torch.randint(0, 500, (3, tokens)),
        "inv_freq": inverse_frequencies(half, 1e4), "sections": [half // 4, half // 4, half - 2 * (half // 4)],
        "key_cache": torch.full((batch, cache_slots, heads[1], head_dim), FILL, dtype=dtype),
        "value_cache": torch.full((batch, cache_slots, heads[1], head_dim), -FILL, dtype=dtype),
        "slots": torch.tensor(slots, dtype=torch.int64),
    }  # fmt: skip
    if norm:
        arguments |= {"q_norm_weight": torch.randn(head_dim).to(dtype), "k_norm_weight": torch.randn(head_dim).to(dtype)}
    return arguments


def run(arguments, function=rope_to_cache, **changes):
    """q and both caches after a call, which gets copies of the caches."""
    arguments = arguments | changes
    caches = {name: arguments[name].clone() for name in ("key_cache", "value_cache")}
    return function(**arguments | caches), *caches.values()


def rope_and_index_copy(q, k, v, key_cache, value_cache, slots, **options):
    q, k = rope(q, k, **options)
    for cache, new in ((key_cache, k), (value_cache, v)):
        cache.index_copy_(1, slots, new.unflatten(0, (len(cache), len(slots))))
    return q


def assert_same(found, expected):
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("sequences", [{}, TWO_SEQUENCES], ids=["one", "two"])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
@pytest.mark.parametrize("head_dim", [8, 72, 128])
def test_fp32_matches_float64(head_dim, norm, sequences, poisoned_empty):
    arguments = make(head_dim, norm=norm, **sequences)
    exact = {name: arguments[name].double() for name in ("q", "k", "v", "key_cache", "value_cache")}
    for out, expected in zip(run(arguments), run(arguments | exact, reference.rope_to_cache), strict=True):
        torch.testing.assert_close(out.double(), expected, **FP32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("head_dim", [72, 128])
@pytest.mark.parametrize("sequences", [{}, TWO_SEQUENCES, {"batch": 3, "slots": (5,)}], ids=["prompt", "chunk", "step"])
def test_the_bits_are_those_of_rope_and_two_copies(head_dim, dtype, sequences, poisoned_empty):
    arguments = make(head_dim, dtype, **sequences)
    found = run(arguments)
    assert_same(found, run(arguments, rope_and_index_copy))
    unused = [slot for slot in range(7) if slot not in arguments["slots"]]
    assert (found[1][:, unused] == FILL).all() and (found[2][:, unused] == -FILL).all()


def test_slots_that_do_not_exist_are_not_written():
    """The caches are the middle of larger tensors, in which nothing else changes."""
    arguments = make(slots=(-1, 2, 7, 2**40, -(2**40)), **{"batch": 2})
    wide = [torch.full((4, 7, 2, 128), FILL) for _ in range(2)]
    caches = {"key_cache": wide[0][1:3], "value_cache": wide[1][1:3]}
    q = rope_to_cache(**arguments | caches)
    expected = rope(*(arguments[name] for name in ("q", "k", "position_ids", "inv_freq", "sections")),
                    arguments["q_norm_weight"], arguments["k_norm_weight"])  # fmt: skip
    assert torch.equal(q, expected[0])
    for x, new in zip(wide, (expected[1], arguments["v"]), strict=True):
        assert torch.equal(x[1:3, 2], new[[1, 6]])
        x[1:3, 2] = FILL
        assert (x == FILL).all()


def test_any_stride_gives_the_same_bits():
    arguments = make(72, **TWO_SEQUENCES)
    expected = run(arguments)
    v = arguments["v"]
    wide = torch.full((6, 2, 73), torch.nan)
    wide[..., :72] = v
    for x in (v.contiguous(), v.transpose(0, 1).contiguous().transpose(0, 1), wide[..., :72]):
        assert_same(run(arguments, v=x), expected)
    strided = torch.stack((arguments["slots"], torch.full((3,), 99)), 1)[:, 0]
    assert_same(run(arguments, slots=strided, position_ids=arguments["position_ids"].int()), expected)
    assert_same(run(arguments, config={"BLOCK_T": 1, "BLOCK_H": 1, "num_warps": 4}), expected)
    assert_same(run(arguments, config={"BLOCK_T": 4, "BLOCK_H": 4, "num_warps": 4}), expected)


def test_values_are_copied_whatever_they_are():
    arguments = make(dtype=torch.float16)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 65504.0, 2**-24, -0.0]).half()
    arguments["v"] = special.repeat(5 * 2 * 128 // 6 + 1)[: 5 * 2 * 128].view(5, 2, 128)
    written = run(arguments)[2][0, :5]
    assert torch.equal(written.view(torch.int16), arguments["v"].view(torch.int16))


@pytest.mark.parametrize("strides", [(2**31, 8, 1), (8, 2**31, 1)], ids=["tokens", "heads"])
def test_offsets_of_v_above_2_31_are_exact(strides):
    arguments = make(8, torch.float16, slots=(4, 1))
    far = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((2, 2, 8), strides)  # only the pages in use take memory
    far.copy_(arguments["v"])
    assert_same(run(arguments, v=far), run(arguments))


def test_offsets_into_large_caches_are_exact():
    """Of slots, and of sequences."""
    for batch, cache_slots, slot in ((1, 2**29 + 2, 2**29 + 1), (2, 2**29 + 2, 0)):
        arguments = make(8, torch.float16, slots=(slot,), batch=batch, cache_slots=1, heads=(1, 1))
        caches = [torch.empty(batch, cache_slots, 1, 8, dtype=torch.float16) for _ in range(2)]
        rope_to_cache(**arguments | {"key_cache": caches[0], "value_cache": caches[1]})
        expected = run(arguments, slots=torch.tensor([0]))
        assert all(torch.equal(cache[:, slot], near[:, 0]) for cache, near in zip(caches, expected[1:], strict=True))


def test_no_tokens_write_nothing():
    arguments = make(slots=())
    q, *caches = run(arguments)
    assert q.shape == (0, 4, 128) and (caches[0] == FILL).all()


def test_memory_traffic_is_close_to_the_floor():
    arguments = make(dtype=torch.float16, batch=2, slots=range(16), cache_slots=16, heads=(32, 8))
    inputs = [arguments[name] for name in ("q", "k", "v", "position_ids", "slots", "q_norm_weight", "k_norm_weight")]
    with count_traffic() as traffic:
        q = rope_to_cache(**arguments)
    floor = tensor_bytes(*inputs, q, arguments["key_cache"], arguments["value_cache"])
    assert len(traffic.launches) == 1 and traffic.idle_programs == 0 and not traffic.eager_operators
    assert traffic.requested <= 1.07 * floor and traffic.unique <= 1.02 * floor
