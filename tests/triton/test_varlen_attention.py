"""The attention kernel in the interpreter: against float64, and exact properties.

`attend` runs every call twice: with a tile schedule from the host, and without one, where each program finds its tile in
cu_seqlens. Both must give the same bits.
"""

import pytest
import torch

from keye_kernels.reference.varlen_attention import varlen_attention as reference
from keye_kernels.segments import tile_schedule
from keye_kernels.tools.bench.traffic import count_traffic
from keye_kernels.triton import varlen_attention as module
from keye_kernels.triton.device import INTERPRETER_ARCH
from keye_kernels.triton.varlen_attention import attention_config, heads_per_l2_group, heuristic, varlen_attention
from tests.helpers.golden import load_golden
from tests.helpers.packed import assert_same_bits, offsets, packed

FP32 = {"atol": 1e-5, "rtol": 1e-5}  # also the tolerance of the golden data, for the output and for lse
MASKS = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
FP16_AND_FP32 = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])


def attend(q, k, v, cu_seqlens, causal=False, scale=None, max_seqlen=None):
    """Returns out and lse. Runs with and without a tile schedule, and compares the results bit by bit."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    max_seqlen = max_seqlen or int(cu_seqlens.diff().max())
    arguments = q, k, v, cu_seqlens, max_seqlen, scale, causal, True
    block_m = attention_config(q.device, q.dtype, q.shape[2], max_seqlen, causal)["BLOCK_M"]
    covers_all_tokens = cu_seqlens[0].item() == 0 and cu_seqlens[-1].item() == q.shape[0]
    scheduled = varlen_attention(*arguments, tile_schedule(cu_seqlens, block_m, causal), covers_all_tokens)
    searched = varlen_attention(*arguments, None, covers_all_tokens)
    assert_same_bits(scheduled, searched)
    return searched


def assert_matches_float64(q, k, v, cu_seqlens, causal=False, scale=None, max_seqlen=None):
    """fp32 within the tolerance. fp16 within twice the error of an eager fp16 run plus one eps of the largest value."""
    out, lse = attend(q, k, v, cu_seqlens, causal, scale, max_seqlen)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    exact, exact_lse = reference(q.double(), k.double(), v.double(), cu_seqlens, scale, causal, True)
    torch.testing.assert_close(lse.double(), exact_lse, **FP32)
    assert out.dtype == q.dtype and out.is_contiguous() and lse.dtype == torch.float32
    if q.dtype == torch.float32:
        torch.testing.assert_close(out.double(), exact, **FP32)
    else:
        eager, _ = reference(q, k, v, cu_seqlens, scale, causal, False)
        allowed = 2 * ((eager - exact).abs().max() + torch.finfo(q.dtype).eps * exact.abs().max())
        assert (out - exact).abs().max() <= allowed


@MASKS
@pytest.mark.parametrize("head_dim", [8, 24, 64, 72, 80, 96, 128, 136, 256], ids=lambda head_dim: f"D{head_dim}")
def test_attention_matches_float64(head_dim, causal, poisoned_empty):
    assert_matches_float64(*packed([133, 0, 12], head_dim, heads=2, key_heads=1), causal)
    assert_matches_float64(*packed([35, 0, 12], head_dim, heads=2, key_heads=1, dtype=torch.float32), causal)


@MASKS
@pytest.mark.parametrize("tokens", [1, 63, 100, 257], ids=lambda tokens: f"T{tokens}")
def test_lengths_around_block_m_match(tokens, causal, poisoned_empty):
    assert_matches_float64(*packed([tokens]), causal)


@MASKS
@pytest.mark.parametrize("max_seqlen", [200, 4096])
def test_a_long_segment_among_many_short_ones_matches(max_seqlen, causal, poisoned_empty):
    assert_matches_float64(*packed([1, 3, 0, 200, 2, 1, 0, 17, 0, 0]), causal, max_seqlen=max_seqlen)


@MASKS
@pytest.mark.parametrize(
    "lengths",
    [
        [1] * 40,
        [2, 0] * 20,
        [0, 0, 0, 5],
        [128, 128, 0, 128],
        [127, 129, 1],
        [130] + [0] * 30,
        [0] * 3 + [70] + [0] * 9,
    ],
    ids=["ones", "every-other-empty", "empty-first", "whole-tiles", "around-a-tile", "padded", "padded-both-ends"],
)
def test_tiles_are_found_among_short_and_empty_segments(lengths, causal, poisoned_empty):
    assert_matches_float64(*packed(lengths, head_dim=16, heads=1, dtype=torch.float32), causal)


@MASKS
def test_padding_with_empty_segments_changes_no_bit(causal, poisoned_empty):
    q, k, v, cu_seqlens = packed([33, 140])
    padded = torch.cat((cu_seqlens, cu_seqlens[-1:].expand(25)))
    assert_same_bits(attend(q, k, v, padded, causal), attend(q, k, v, cu_seqlens, causal))


@FP16_AND_FP32
def test_attention_matches_the_golden_data(dtype):
    case = load_golden("preview", "kernel_varlen_attention.safetensors")
    scale, cu_seqlens = case["softmax_scale"].item(), case["cu_seqlens"]
    q, k, v = (case[name].to(dtype) for name in ("q", "k", "v"))
    if dtype == torch.float32:
        out, lse = attend(q, k, v, cu_seqlens, scale=scale)
        torch.testing.assert_close(out.double(), case["out_f64"], **FP32)
        torch.testing.assert_close(lse.double(), case["lse_f64"], **FP32)
    else:
        assert_matches_float64(q, k, v, cu_seqlens, scale=scale)


@MASKS
@FP16_AND_FP32
def test_grouped_heads_share_their_key_head(dtype, causal):
    q, k, v, cu_seqlens = packed([40, 30], head_dim=24, heads=6, key_heads=2, dtype=dtype)
    repeated = (x.repeat_interleave(3, dim=1) for x in (k, v))
    assert_same_bits(attend(q, k, v, cu_seqlens, causal), attend(q, *repeated, cu_seqlens, causal))


def test_any_token_and_head_stride_gives_the_same_bits():
    q, k, v, cu_seqlens = packed([30, 10], heads=4, key_heads=2)
    contiguous = attend(q, k, v, cu_seqlens)
    fused = torch.cat((q, k, v), dim=1)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    odd = [torch.full((*x.shape[:2], 75), torch.nan, dtype=x.dtype)[..., 1:73].copy_(x) for x in (q, k, v)]
    for views in (fused.split((4, 2, 2), dim=1), heads_first, odd):
        before = [x.clone() for x in views]
        assert_same_bits(attend(*views, cu_seqlens), contiguous)
        assert_same_bits(views, before)


def test_rows_of_a_block_may_be_more_than_32_bits_apart():
    q, k, v, cu_seqlens = packed([3], head_dim=8, heads=1)
    # 4 GB of addresses, three pages of memory
    far = torch.empty_strided(k.shape, (2**30, 8, 1), dtype=k.dtype).copy_(k)
    assert_same_bits(attend(q, far, v, cu_seqlens), attend(q, k, v, cu_seqlens))


@pytest.mark.parametrize("scale", [-8.0, 0.0, 2.0])  # with -8, exp2 of a score overflows unless the maximum is subtracted
def test_any_scale_matches(scale):
    assert_matches_float64(*packed([70], head_dim=16, dtype=torch.float32), scale=scale)


@MASKS
@pytest.mark.parametrize("cu_seqlens", [[10, 30, 30, 90, 90], [0, 90], [40, 130], [129, 130]], ids=str)
def test_tokens_of_no_segment_get_zero(cu_seqlens, causal, poisoned_empty):
    q, k, v, _ = packed([20, 60], extra=50)
    first, last = cu_seqlens[0], cu_seqlens[-1]
    cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)
    out, lse = attend(q, k, v, cu_seqlens, causal)
    assert_matches_float64(q, k, v, cu_seqlens, causal)
    outside = torch.ones(130, dtype=torch.bool)
    outside[first:last] = False
    assert not out[outside].any() and (lse[:, outside] == -torch.inf).all() and lse[:, ~outside].isfinite().all()


@pytest.mark.parametrize("cu_seqlens", [[0], [0, 0], [3, 3, 3]], ids=str)
def test_without_tokens_in_segments_all_outputs_are_zero(cu_seqlens, poisoned_empty):
    q, k, v, _ = packed([5])
    cu_seqlens = torch.tensor(cu_seqlens).int()
    for schedule in (None, tile_schedule(cu_seqlens, 128, False)):
        with count_traffic() as traffic:
            out, lse = varlen_attention(q, k, v, cu_seqlens, 0, 1.0, False, True, schedule)
        assert not out.any() and (lse == -torch.inf).all()
        assert not any(launch.stored for launch in traffic.launches)
    assert traffic.launches == []  # with a schedule


@pytest.mark.parametrize("cu_seqlens", [[0], [0, 0, 0]], ids=str)
def test_no_tokens_give_empty_outputs(cu_seqlens):
    q, k, v, _ = packed([0])
    for covers_all_tokens in (False, True):
        out, lse = varlen_attention(q, k, v, torch.tensor(cu_seqlens).int(), 0, 1.0, False, True, None, covers_all_tokens)
        assert out.shape == q.shape and lse.shape == (2, 0)


def test_lse_is_empty_unless_requested():
    q, k, v, cu_seqlens = packed([70])
    out, lse = varlen_attention(q, k, v, cu_seqlens, 70, 72**-0.5, False, False)
    assert lse.shape == (2, 0) and lse.dtype == torch.float32 and torch.equal(out, attend(q, k, v, cu_seqlens)[0])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns about the NaN
@MASKS
@FP16_AND_FP32
def test_other_segments_change_no_bit(dtype, causal):
    q, k, v, cu_seqlens = packed([33, 70, 20], dtype=dtype)
    out, lse = attend(q, k, v, cu_seqlens, causal)
    for x in (q, k, v):
        x[33:103] = torch.nan
    other, other_lse = attend(q, k, v, cu_seqlens, causal)
    rest = [*range(33), *range(103, 123)]
    assert_same_bits((out[rest], lse[:, rest]), (other[rest], other_lse[:, rest]))
    assert other[33:103].isnan().all()


@MASKS
@FP16_AND_FP32
def test_order_and_packing_change_no_bit(dtype, causal):
    q, k, v, cu_seqlens = packed([33, 100, 20], heads=1, dtype=dtype)
    together = attend(q, k, v, cu_seqlens, causal)
    parts = [slice(0, 33), slice(33, 133), slice(133, 153)]
    swapped = attend(*(torch.cat([x[parts[i]] for i in (2, 0, 1)]) for x in (q, k, v)), offsets([20, 33, 100]), causal)
    moved = [slice(20, 53), slice(53, 153), slice(0, 20)]
    for here, there in zip(parts, moved, strict=True):
        segment = (together[0][here], together[1][:, here])
        alone = attend(q[here], k[here], v[here], offsets([here.stop - here.start]), causal)
        assert_same_bits(segment, alone)
        assert_same_bits(segment, (swapped[0][there], swapped[1][:, there]))


GUARD = 64  # tokens


@MASKS
@pytest.mark.parametrize(
    "cu_seqlens",
    [
        [-50, 40],
        [0, 200],
        [-300, -20],
        [90, 300],
        [0, 60, 30, 80],
        [60, 10],
        [-200, 0, 80, 900],
        [2**31 - 1, 2**31 - 1],
    ],
    ids=str,
)
def test_out_of_range_offsets_access_nothing_outside(cu_seqlens, causal, monkeypatch):
    """80 tokens between guards: reads of a guard give NaN in the output, writes change the guard."""
    tokens, shape = slice(GUARD, GUARD + 80), (80 + 2 * GUARD, 2, 24)
    buffers = [torch.full(shape, torch.nan) for _ in range(3)]
    for buffer in buffers:
        buffer[tokens] = torch.randn(80, 2, 24)
    out, lse = torch.full(shape, 7.0), torch.full((2 * 80 + 2 * GUARD,), 7.0)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: out[tokens].zero_())
    monkeypatch.setattr(torch, "empty", lambda *_, **__: lse[GUARD:-GUARD].view(2, 80))
    cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)
    varlen_attention(*(buffer[tokens] for buffer in buffers), cu_seqlens, 80, 0.2, causal, True)
    for guarded in (out, lse):
        assert (guarded[:GUARD] == 7).all() and (guarded[-GUARD:] == 7).all()
    assert out[tokens].isfinite().all()


def test_head_groups_change_no_bit(monkeypatch):
    q, k, v, cu_seqlens = packed([70, 20], heads=6, key_heads=3)
    together = attend(q, k, v, cu_seqlens)
    sizes = []
    monkeypatch.setattr(module, "heads_per_l2_group", lambda *arguments: sizes.append(arguments) or 2)
    assert_same_bits(attend(q, k, v, cu_seqlens), together)
    assert set(sizes) == {(3, 2, 2 * 70 * 72 * 2)}  # keys and values of the longest segment in bytes


def test_head_groups_hold_whole_key_heads_that_fit_in_l2(monkeypatch):
    monkeypatch.setattr(module, "L2_GROUP_BYTES", 1000)
    assert [heads_per_l2_group(8, 4, size) for size in (1, 125, 126, 250, 400, 1001)] == [32, 32, 16, 16, 8, 4]


@pytest.mark.skipif(module.TRITON_VERSION < (3, 5), reason="tl.dot of Triton 3.4 needs at least 16 columns")
@pytest.mark.parametrize(("block_m", "limit"), [(64, 1.10), (128, 1.30)], ids=["64-rows", "128-rows"])
def test_flops_are_close_to_the_floor(block_m, limit):
    config = heuristic(INTERPRETER_ARCH, 72, torch.float16) | {"BLOCK_M": block_m}
    for lengths in ([1024], [576, 252, 112, 84]):
        q, k, v, cu_seqlens = packed(lengths, heads=1)
        schedule = tile_schedule(cu_seqlens, block_m, False)
        with count_traffic() as traffic:
            varlen_attention(q, k, v, cu_seqlens, max(lengths), 72**-0.5, False, True, schedule, True, config)
        needed = 4 * 72 * sum(length**2 for length in lengths)
        assert traffic.dot_flops <= (1.06 if len(lengths) == 1 else limit) * needed
        [launch] = traffic.launches
        assert launch.idle_programs == 0
        # Every input is read and the output is written, and nothing outside them. A schedule entry has 12 bytes
        assert launch.loaded_once - launch.programs * 12 == 3 * q.nbytes
        assert launch.stored_once == q.nbytes + 4 * sum(lengths)


def test_causal_skips_the_keys_past_the_diagonal():
    q, k, v, cu_seqlens = packed([1024], heads=1)
    with count_traffic() as traffic:
        varlen_attention(q, k, v, cu_seqlens, 1024, 72**-0.5, True, True)
    assert traffic.dot_flops <= 0.57 * 4 * 72 * 1024**2 * 19 / 18  # (16 + 1) / 32 of the tiles, 76 channels for 72
