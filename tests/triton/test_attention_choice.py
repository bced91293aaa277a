"""Which backend `impl="auto"` runs for one call of attention, and what the operator passes to the launcher."""

import importlib

import pytest
import torch
from torch.library import opcheck

import keye_kernels as kk
from keye_kernels.ops import implementation
from keye_kernels.segments import Segments
from keye_kernels.triton import varlen_attention as launcher
from tests.helpers.packed import offsets, packed

operator = importlib.import_module("keye_kernels.ops.varlen_attention")
CPU = torch.device("cpu")


@pytest.fixture
def choices(monkeypatch):
    """`_choose` on a device where "auto" means Triton, with a table that names `backend`. Records the keys of the table."""
    made = {"backend": "torch", "keys": [], "reason": None}

    def config(*key):
        made["keys"].append(key)
        return {"BLOCK_M": 64, "backend": made["backend"]}

    def resolve(impl, *rest):
        impl = implementation.default_impl() if impl == "auto" else impl
        return "triton" if impl == "auto" else impl

    monkeypatch.setattr(operator, "resolve", resolve)
    monkeypatch.setattr(launcher, "attention_config", config)
    monkeypatch.setattr(operator, "why_not_flash", lambda *call: made.update(call=call) or made["reason"])
    implementation.log_choice.cache_clear()
    return made


def choose(impl="auto", lengths=(40, 30), max_seqlen=40, scale=0.3, causal=False, dtype=torch.float16):
    q, k, v, cu_seqlens = packed(lengths, dtype=dtype)
    return operator._choose(impl, q, k, v, cu_seqlens, max_seqlen, scale, causal)


def test_auto_runs_torch_where_a_table_says_so_and_torch_can(choices):
    assert choose() == ("torch", 0)
    assert choices["call"][4:] == (40, 0.3) and len(choices["call"][3]) == 3
    choices["reason"] = "it cannot"
    assert choose() == ("triton", 64)
    choices |= {"reason": None, "backend": "triton"}
    assert choose() == ("triton", 64)


@pytest.mark.parametrize("impl", ["triton", "reference", "torch", "flash_attn"])
def test_a_named_implementation_is_kept(impl, choices):
    assert choose(impl) == (impl, 64 if impl == "triton" else 0)
    with kk.use_impl(impl):
        assert choose() == (impl, 64 if impl == "triton" else 0)


def test_padded_offsets_are_not_passed_to_a_library(choices):
    """The library launches segments x max_seqlen rows of tiles, 16 times the tokens at most."""
    assert operator.MAX_GRID_RATIO == 16
    assert choose(lengths=[10] * 4, max_seqlen=160)[0] == "torch"  # 4 x 160 = 16 x 40
    assert choose(lengths=[10] * 4, max_seqlen=161)[0] == "triton"
    assert choose(lengths=[10] * 4 + [0], max_seqlen=160)[0] == "triton"


def test_the_table_is_looked_up_with_the_sizes_of_the_call(choices):
    choose(causal=True, max_seqlen=55)
    choose(dtype=torch.bfloat16)
    assert choices["keys"] == [(CPU, torch.float16, 72, 55, True), (CPU, torch.float32, 72, 40, False)]  # the interpreter's dtype


@pytest.mark.parametrize("scheduled", [False, True])
def test_the_launcher_gets_the_call(scheduled, monkeypatch):
    q, k, v, cu_seqlens = packed([40, 30], heads=4, key_heads=2)
    calls, run = [], launcher.varlen_attention
    monkeypatch.setattr(launcher, "varlen_attention", lambda *call: calls.append(call) or run(*call))
    given = Segments.from_lengths([40, 30], CPU) if scheduled else cu_seqlens
    kk.ops.varlen_attention(q, k, v, given, 50, softmax_scale=0.7, causal=True, return_lse=True, impl="triton")
    [(*tensors, offsets_, max_seqlen, scale, causal, return_lse, schedule, covers_all_tokens, config)] = calls
    assert all(x is y for x, y in zip(tensors, (q, k, v), strict=True)) and torch.equal(offsets_, cu_seqlens)
    assert (max_seqlen, scale, causal, return_lse, covers_all_tokens) == (40 if scheduled else 50, 0.7, True, True, True)
    assert schedule.shape == (2, 3) and config["BLOCK_M"] == launcher.attention_config(CPU, q.dtype, 72, 50, True)["BLOCK_M"]


@pytest.mark.parametrize(("first", "last", "covers"), [(0, 70, True), (1, 70, False), (0, 69, False)])
def test_the_output_is_filled_with_zeros_unless_segments_cover_it(first, last, covers, monkeypatch):
    q, k, v, _ = packed([70])
    calls = []
    monkeypatch.setattr(launcher, "varlen_attention", lambda *call: calls.append(call[-2]) or (q, q))
    kk.ops.varlen_attention(q, k, v, torch.tensor([first, 40, last], dtype=torch.int32), 40, impl="triton")
    assert calls == [covers]


@pytest.mark.parametrize("covers", [True, False])
def test_segments_say_whether_they_cover_all_tokens(covers, monkeypatch):
    q, k, v, cu_seqlens = packed([70])
    calls = []
    monkeypatch.setattr(operator, "call", lambda _, *call: calls.append(call[-1]) or (q, q))
    kk.ops.varlen_attention(q, k, v, Segments(cu_seqlens, 70, covers_all_tokens=covers), impl="triton")
    assert calls == [covers]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("return_lse", [False, True])
def test_the_fake_operator_has_the_shapes_and_dtypes_of_the_real_one(return_lse, dtype):
    q, k, v, cu_seqlens = packed([4, 3], head_dim=8, heads=4, key_heads=2, dtype=dtype)
    arguments = q, k, v, cu_seqlens, 4, 0.3, False, return_lse, "reference", None, 0, False
    opcheck(torch.ops.keye_kernels.varlen_attention.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_offsets_are_read_once_to_check_them():
    assert operator._check_offsets(offsets([3, 0, 4]), 7) == [0, 3, 3, 7] and operator._check_offsets(offsets([3]) + 2, 5) == [
        2,
        5,
    ]
    for wrong in ([0, 4, 3], [-1, 3], [0, 8]):
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 or more to at most q's 7 tokens"):
            operator._check_offsets(torch.tensor(wrong, dtype=torch.int32), 7)


def test_only_the_lengths_of_segments_are_cached_not_the_implementation():
    """One batch may run in several implementations."""
    q, k, v, _ = packed([40, 30], dtype=torch.float32)
    segments = Segments.from_lengths([40, 30], CPU)
    outs = [kk.ops.varlen_attention(q, k, v, segments, impl=impl) for impl in ("triton", "reference", "triton")]
    assert torch.equal(outs[0], outs[2])
    torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=1e-5)
