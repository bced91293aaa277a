"""Packed attention in the interpreter: against float64, exact properties, the tile schedule, and the numbers of the design."""

import gc
import weakref

import pytest
import torch

from keye_kernels.reference.varlen_attention import varlen_attention as reference
from keye_kernels.tools.bench.traffic import count_traffic
from keye_kernels.triton import schedule, varlen_attention
from keye_kernels.triton.schedule import tile_schedule
from keye_kernels.triton.varlen_attention import heads_that_stay_near, heuristic
from tests.helpers.golden import load_golden
from tests.helpers.machine_code import read_machine_code

FP32 = {"atol": 1e-5, "rtol": 1e-5}  # also the golden README's, for the output and for lse
MASKS = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
FP16_AND_FP32 = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])


def packed(lengths, head_dim=72, heads=2, key_heads=None, dtype=torch.float16, extra=0, seed=0):
    """q, k, v and cu_seqlens of segments, with `extra` tokens of no segment behind them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(sum(lengths) + extra, count, head_dim) for count in (heads, key_heads or heads, key_heads or heads)]
    return *(torch.randn(shape, generator=generator).to(dtype) for shape in shapes), offsets(lengths)


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def attend(q, k, v, cu_seqlens, causal=False, scale=None, max_seqlen=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    max_seqlen = max_seqlen or int(cu_seqlens.diff().max())
    return varlen_attention.varlen_attention(q, k, v, cu_seqlens, max_seqlen, scale, causal, True)


def assert_matches_float64(q, k, v, cu_seqlens, causal=False, scale=None, max_seqlen=None):
    """fp32 within the tolerance; fp16 within twice what the eager run loses in fp16, plus one eps of the largest value."""
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


def assert_same_bits(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@MASKS
@pytest.mark.parametrize("head_dim", [8, 24, 64, 72, 80, 96, 128, 136, 256], ids=lambda head_dim: f"D{head_dim}")
def test_attention_matches_float64(head_dim, causal, poisoned_empty):
    assert_matches_float64(*packed([133, 0, 12], head_dim, heads=2, key_heads=1), causal)
    assert_matches_float64(*packed([35, 0, 12], head_dim, heads=2, key_heads=1, dtype=torch.float32), causal)


@MASKS
@pytest.mark.parametrize("tokens", [1, 63, 100, 257], ids=lambda tokens: f"T{tokens}")
def test_lengths_around_the_tile_match(tokens, causal, poisoned_empty):
    assert_matches_float64(*packed([tokens]), causal)


@MASKS
@pytest.mark.parametrize("max_seqlen", [200, 4096])
def test_a_long_segment_beside_many_short_ones_matches(max_seqlen, causal, poisoned_empty):
    assert_matches_float64(*packed([1, 3, 0, 200, 2, 1, 0, 17, 0, 0]), causal, max_seqlen=max_seqlen)


@FP16_AND_FP32
def test_attention_matches_the_official_numbers(dtype):
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


def test_rows_of_a_block_may_lie_past_32_bits():
    q, k, v, cu_seqlens = packed([3], head_dim=8, heads=1)
    far = torch.empty_strided(k.shape, (2**30, 8, 1), dtype=k.dtype).copy_(
        k
    )  # 4 GB of addresses, three pages of memory
    assert_same_bits(attend(q, far, v, cu_seqlens), attend(q, k, v, cu_seqlens))


@pytest.mark.parametrize("scale", [-8.0, 0.0, 2.0])  # -8: scores that overflow exp2 unless their maximum is taken off
def test_any_scale_matches(scale):
    assert_matches_float64(*packed([70], head_dim=16, dtype=torch.float32), scale=scale)


@MASKS
def test_tokens_of_no_segment_get_zero(causal, poisoned_empty):
    q, k, v, _ = packed([20, 60], extra=50)
    cu_seqlens = torch.tensor([10, 30, 30, 90, 90], dtype=torch.int32)
    out, lse = attend(q, k, v, cu_seqlens, causal)
    assert_matches_float64(q, k, v, cu_seqlens, causal)
    stranger = torch.ones(130, dtype=torch.bool)
    stranger[10:90] = False
    assert not out[stranger].any() and (lse[:, stranger] == -torch.inf).all() and lse[:, ~stranger].isfinite().all()


@pytest.mark.parametrize("cu_seqlens", [[0], [0, 0], [3, 3, 3]])
def test_no_work_launches_nothing(cu_seqlens, poisoned_empty):
    q, k, v, _ = packed([5])
    with count_traffic() as traffic:
        out, lse = varlen_attention.varlen_attention(q, k, v, torch.tensor(cu_seqlens).int(), 0, 1.0, False, True)
    assert not out.any() and (lse == -torch.inf).all() and traffic.launches == []


def test_lse_is_left_out_where_nobody_asks():
    q, k, v, cu_seqlens = packed([70])
    out, lse = varlen_attention.varlen_attention(q, k, v, cu_seqlens, 70, 72**-0.5, False, False)
    assert lse.shape == (2, 0) and lse.dtype == torch.float32 and torch.equal(out, attend(q, k, v, cu_seqlens)[0])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the NaN
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


def test_rounds_of_heads_change_no_bit(monkeypatch):
    q, k, v, cu_seqlens = packed([70, 20], heads=6, key_heads=3)
    together = attend(q, k, v, cu_seqlens)
    sizes = []
    monkeypatch.setattr(varlen_attention, "heads_that_stay_near", lambda *sizes_: sizes.append(sizes_) or 2)
    assert_same_bits(attend(q, k, v, cu_seqlens), together)
    assert sizes == [(3, 2, 2 * 70 * 72 * 2)]  # the longest segment's keys and values


def test_heads_are_taken_in_whole_groups_that_fit(monkeypatch):
    monkeypatch.setattr(varlen_attention, "NEAR_BYTES", 1000)
    assert [heads_that_stay_near(8, 4, size) for size in (1, 125, 126, 250, 400, 1001)] == [32, 32, 16, 16, 8, 4]


@MASKS
def test_schedule_holds_each_query_once_and_most_work_first(causal):
    lengths = [5, 0, 300, 64, 1, 129, 0]
    made = tile_schedule(offsets(lengths), 64, causal)
    entries = made.entries.tolist()
    queries = [start + q for start, length, first in entries for q in range(first, min(first + 64, length))]
    assert sorted(queries) == list(range(sum(lengths))) and made.entries.dtype == torch.int32
    assert all(first < length for _, length, first in entries)
    work = [min(first + 64, length) if causal else length for _, length, first in entries]
    assert work == sorted(work, reverse=True)
    assert made.longest == 300 and made.covers(499) and not made.covers(500)


def test_offsets_are_read_once_for_all_layers(monkeypatch):
    reads = []
    read = schedule._read_offsets
    monkeypatch.setattr(schedule, "_read_offsets", lambda cu_seqlens: reads.append(1) or read(cu_seqlens))
    q, k, v, cu_seqlens = packed([40, 30], head_dim=16)
    for _ in range(3):
        attend(q, k, v, cu_seqlens)
        attend(q, k, v, cu_seqlens, causal=True)
    assert len(reads) == 1
    cu_seqlens[1] = 20
    assert_matches_float64(q, k, v, cu_seqlens)
    assert len(reads) == 2
    # without a version counter nothing tells a change: correct before fast
    with torch.inference_mode():
        cu_seqlens = offsets([40, 30])
        attend(q, k, v, cu_seqlens)
        cu_seqlens[1] = 20
        assert_matches_float64(q, k, v, cu_seqlens)


def test_schedules_die_with_their_offsets():
    cu_seqlens = offsets([40, 30])
    entries = weakref.ref(tile_schedule(cu_seqlens, 64, False).entries)
    gc.collect()
    assert entries() is not None
    del cu_seqlens
    gc.collect()
    assert entries() is None


@pytest.mark.parametrize(
    ("cu_seqlens", "message"), [([0, 4, 3], "never decrease"), ([-1, 4], "start at 0"), ([0, 8], "end at or before")]
)
def test_offsets_that_point_elsewhere_are_refused(cu_seqlens, message):
    q, k, v, _ = packed([5])
    with pytest.raises(ValueError, match=f"cu_seqlens must.*{message}"):
        attend(q, k, v, torch.tensor(cu_seqlens, dtype=torch.int32))


@pytest.mark.skipif(varlen_attention.TRITON_VERSION < (3, 5), reason="Triton 3.4 multiplies 16 columns at the least")
@pytest.mark.parametrize(("rows", "limit"), [(64, 1.10), (128, 1.30)], ids=["64-rows", "128-rows"])
def test_multiplies_stay_near_what_is_needed(rows, limit):
    tile = heuristic(90, 72, torch.float16) | {"BLOCK_M": rows}
    for lengths in ([1024], [576, 252, 112, 84]):
        q, k, v, cu_seqlens = packed(lengths, heads=1)
        with count_traffic() as traffic:
            varlen_attention.varlen_attention(q, k, v, cu_seqlens, max(lengths), 72**-0.5, False, True, tile)
        needed = 4 * 72 * sum(n * n for n in lengths)
        assert traffic.dot_flops <= (1.06 if len(lengths) == 1 else limit) * needed
        [launch] = traffic.launches
        assert launch.idle_programs == 0
        # every input read and the output written at least once, and nothing outside them
        assert launch.loaded_once - launch.programs * 12 == 3 * q.nbytes
        assert launch.stored_once == q.nbytes + 4 * sum(lengths)


def test_causal_skips_the_keys_past_the_diagonal():
    q, k, v, cu_seqlens = packed([1024], heads=1)
    with count_traffic() as traffic:
        attend(q, k, v, cu_seqlens, causal=True)
    assert traffic.dot_flops <= 0.57 * 4 * 72 * 1024**2 * 19 / 18  # (16 + 1) / 32 tiles, of 76 for 72 channels


def test_machine_code_meets_the_design():
    for row in read_machine_code(*((f"sm_{arch}", "varlen_attention", "vision bf16") for arch in (80, 90, 100))):
        is_sm_80 = row["target"] == "sm_80"
        assert row["stack_bytes"] == 0
        assert row["instructions_a_score"] <= (11 if is_sm_80 else 9) and row["integer_a_score"] <= 1.5
        assert row["blocks"] * row["warps"] >= 8 or row["blocks"] >= 2
        assert row["shared_bytes"] <= (80 if is_sm_80 else 100) * 1024
        assert not {"LDG.16", "STG.16", "STS.16"} & row["accesses"].keys()
        assert row["loop_accesses"]["LDGSTS.128"] >= 9 and "LDG.128" not in row["loop_accesses"]


def test_torch_computes_what_a_table_gives_it_and_only_that(monkeypatch):
    q, k, v, cu_seqlens = packed([40, 30], heads=4, key_heads=2)
    asked = []

    def flash(q, k, v, *rest, scale):
        asked.append((*rest, scale))
        return (torch.full_like(q, 7),)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash)
    monkeypatch.setattr(varlen_attention, "_is_for_torch", lambda q, *rest: q.dtype == torch.float16)
    tile = heuristic(90, 72, torch.float16) | {"path": "torch"}

    def run(q, k, v, offsets, scale=0.1, causal=True, lse=False):
        return varlen_attention.varlen_attention(q, k, v, offsets, 4096, scale, causal, lse, tile)[0]

    assert (run(q, k, v, cu_seqlens, scale=-0.1) == 7).all()
    [(*lengths, longest, longest_key, dropout, causal, mask, scale)] = asked
    assert all(x is cu_seqlens for x in lengths) and (longest, longest_key, dropout, mask) == (40, 40, 0.0, False)
    assert causal and scale == 0.1
    exact = reference(q.double(), k.double(), v.double(), cu_seqlens, 0.1, True, False)[0]
    for dtype, offsets, lse in ((torch.float16, cu_seqlens, True), (torch.float32, cu_seqlens, False)):
        found = run(q.to(dtype), k.to(dtype), v.to(dtype), offsets, lse=lse)
        torch.testing.assert_close(found.double(), exact, atol=2e-3, rtol=2e-3)
    assert not run(q, k, v, cu_seqlens[:2].clone())[40:].any()
    assert len(asked) == 1


def test_what_torch_would_compute_otherwise_stays_here():
    class OnGpu(torch.Tensor):
        is_cuda = True

    q, k, v, _ = packed([8], heads=2)
    q, k, v = (x.as_subclass(OnGpu) for x in (q, k, v))
    wide = torch.zeros(8, 2, 75, dtype=torch.float16).as_subclass(OnGpu)[..., :72]
    allowed = varlen_attention._is_for_torch
    assert allowed(q, k, v, 0.1, 8)
    assert not allowed(q, k, v, 0.0, 8)  # it multiplies the mask's -inf by it
    assert not allowed(q, k, v, 0.1, 1)
    assert not allowed(q, wide, v, 0.1, 8)
    assert not allowed(q.float(), k.float(), v.float(), 0.1, 8)
