"""The operator `ops.varlen_attention`: tile schedules, shared `Segments`, and the choice of a backend."""

import importlib
import logging

import pytest
import torch

import keye_kernels as kk
from keye_kernels import segments as segments_module
from keye_kernels.ops import attention_libraries, implementation
from keye_kernels.ops.attention_libraries import torch_attention, why_not_flash
from keye_kernels.reference.varlen_attention import varlen_attention as reference
from keye_kernels.segments import PaddedSegments, Segments, tile_schedule
from keye_kernels.tools.bench.traffic import count_traffic
from keye_kernels.triton import varlen_attention as launcher
from tests.helpers.packed import assert_same_bits, offsets, packed

# The package has a function of the same name
operator_module = importlib.import_module("keye_kernels.ops.varlen_attention")
CPU = torch.device("cpu")
MASKS = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def attend(q, k, v, cu_seqlens, max_seqlen=70, impl="triton", **options):
    return kk.ops.varlen_attention(q, k, v, cu_seqlens, max_seqlen, impl=impl, return_lse=True, **options)


@MASKS
def test_a_schedule_has_each_query_once_and_most_work_first(causal):
    lengths = [5, 0, 300, 64, 1, 129, 0]
    schedule = tile_schedule(offsets(lengths), 64, causal)
    entries = schedule.tolist()
    queries = [start + q for start, length, first in entries for q in range(first, min(first + 64, length))]
    assert sorted(queries) == list(range(sum(lengths))) and schedule.dtype == torch.int32
    assert all(first < length for _, length, first in entries)
    work = [min(first + 64, length) if causal else length for _, length, first in entries]
    assert work == sorted(work, reverse=True)


@MASKS
def test_a_schedule_keeps_offsets_that_do_not_start_at_0(causal):
    shifted, plain = (tile_schedule(offsets([40, 30]) + first, 64, causal) for first in (7, 0))
    assert torch.equal(shifted - plain, torch.tensor([[7, 0, 0]] * 2, dtype=torch.int32))


@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
def test_a_schedule_of_no_tokens_is_empty(lengths):
    assert tile_schedule(offsets(lengths), 64, False).shape == (0, 3)


@MASKS
def test_padded_segments_give_the_same_bits(causal):
    """The rows of no segment have NaN: no other row reads them."""
    segments = PaddedSegments(8, 224, 128, CPU)
    for lengths in ([70, 20, 1], [128, 40]):
        q, k, v, cu_seqlens = packed(lengths, extra=224 - sum(lengths), head_dim=24)
        for x in (q, k, v):
            x[sum(lengths) :] = torch.nan
        expected = attend(q, k, v, cu_seqlens, 128, causal=causal)
        segments.update(lengths)
        out, lse = attend(q, k, v, segments, None, causal=causal)
        count = sum(lengths)
        assert_same_bits((out[:count], lse[:, :count]), (expected[0][:count], expected[1][:, :count]))


def test_segments_from_lengths():
    segments = Segments.from_lengths([3, 0, 5], CPU)
    assert segments.cu_seqlens.tolist() == [0, 3, 3, 8] and segments.cu_seqlens.dtype == torch.int32
    assert segments.max_seqlen == 5 and segments.lengths == (3, 0, 5)
    empty = Segments.from_lengths([], CPU)
    assert empty.cu_seqlens.tolist() == [0] and empty.max_seqlen == 0


def test_segments_without_host_lengths_have_no_schedule():
    assert Segments(offsets([3, 5]), 5).schedule(64, False) is None


def test_segments_build_each_schedule_once_per_batch(monkeypatch):
    calls = []
    build = segments_module.tile_schedule
    monkeypatch.setattr(segments_module, "tile_schedule", lambda *args: calls.append(args[1:]) or build(*args))
    monkeypatch.setattr(operator_module, "tile_schedule", None)  # the schedule of plain offsets must not be built
    q, k, v, _ = packed([40, 30], head_dim=16)
    segments = Segments.from_lengths([40, 30], CPU)
    block_m = launcher.attention_config(CPU, q.dtype, 16, 70, False)["BLOCK_M"]
    for _ in range(3):
        attend(q, k, v, segments)
        attend(q, k, v, segments, causal=True)
    assert sorted(calls) == [(block_m, False), (block_m, True)]
    attend(q, k, v, Segments.from_lengths([40, 30], CPU))
    assert len(calls) == 3


@MASKS
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_segments_give_the_bits_of_plain_offsets(impl, causal):
    lengths = [40, 0, 70, 1]
    q, k, v, cu_seqlens = packed(lengths, heads=4, key_heads=2)
    plain = attend(q, k, v, cu_seqlens, impl=impl, causal=causal)
    assert_same_bits(attend(q, k, v, Segments.from_lengths(lengths, CPU), impl=impl, causal=causal), plain)
    assert_same_bits(attend(q, k, v, Segments(cu_seqlens, 70), impl=impl, causal=causal), plain)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("lengths", [[10, 20], [10, 5], []], ids=str)
def test_segments_of_another_number_of_tokens_are_refused(lengths, impl):
    q, k, v, _ = packed([25])
    with pytest.raises(ValueError, match=rf"cu_seqlens must have segments of q's 25 tokens, got {sum(lengths)} tokens"):
        attend(q, k, v, Segments.from_lengths(lengths, CPU), impl=impl)


def test_segments_need_no_max_seqlen():
    q, k, v, cu_seqlens = packed([40, 30])
    out = kk.ops.varlen_attention(q, k, v, Segments.from_lengths([40, 30], CPU), impl="triton")
    assert torch.equal(out, attend(q, k, v, cu_seqlens)[0])
    with pytest.raises(TypeError, match="max_seqlen must be an int, got NoneType"):
        kk.ops.varlen_attention(q, k, v, cu_seqlens, impl="triton")


def test_a_schedule_of_another_tile_height_is_not_used(monkeypatch):
    """Tables may be reloaded between the choice of a schedule and the launch."""
    q, k, v, cu_seqlens = packed([70, 200])
    expected = attend(q, k, v, cu_seqlens)
    choose = operator_module._choose
    monkeypatch.setattr(operator_module, "_choose", lambda *call: (choose(*call)[0], 32))
    assert_same_bits(attend(q, k, v, Segments.from_lengths([70, 200], CPU)), expected)


def test_a_compiled_function_is_compiled_once_for_any_number_of_segments():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    q, k, v, _ = packed([24], head_dim=16, dtype=torch.float32)
    compiled = torch.compile(lambda s: kk.ops.varlen_attention(q, k, v, s, impl="reference"), backend=backend, dynamic=True)
    for lengths in ([24], [12, 12], [6, 6, 12], [2] * 12, [1] * 24):
        segments = Segments.from_lengths(lengths, CPU)
        expected = kk.ops.varlen_attention(q, k, v, segments, impl="reference")
        torch.testing.assert_close(compiled(segments), expected)
    assert len(graphs) <= 3, "one for any number of offsets, and what torch specializes for sizes 1 and 2"


def test_gradients_pass_through_segments():
    q, k, v, cu_seqlens = packed([20, 13], head_dim=16, dtype=torch.float32)
    found = []
    for given in (cu_seqlens, Segments.from_lengths([20, 13], CPU)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, _ = attend(*leaves, given)
        found.append(torch.autograd.grad(out.square().sum(), leaves))
    assert_same_bits(*found)


@MASKS
def test_no_program_is_idle_on_a_cpu(causal):
    lengths = [1, 3, 0, 200, 2, 1, 0, 17, 0, 0]
    q, k, v, cu_seqlens = packed(lengths, head_dim=16)
    for given in (cu_seqlens, Segments.from_lengths(lengths, CPU)):
        with count_traffic() as traffic:
            attend(q, k, v, given, 200, causal=causal)
        [launch] = traffic.launches
        assert launch.idle_programs == 0 and launch.programs == 2 * (5 + 2)  # heads x tiles; 200 tokens need two tiles of 128


@pytest.mark.parametrize(
    "write",
    [
        lambda cu_seqlens: cu_seqlens.__setitem__(1, 20),
        lambda cu_seqlens: cu_seqlens.data.__setitem__(1, 20),
        lambda cu_seqlens: cu_seqlens.numpy().__setitem__(1, 20),
    ],
    ids=["tensor", "data", "numpy"],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_changes_of_plain_offsets_take_effect(write, mode):
    q, k, v, _ = packed([40, 30], head_dim=16)
    with mode():
        cu_seqlens = offsets([40, 30])
        before = attend(q, k, v, cu_seqlens)
        write(cu_seqlens)
        after = attend(q, k, v, cu_seqlens)
        assert_same_bits(after, attend(q, k, v, offsets([20, 50])))
    assert not torch.equal(before[0], after[0])


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("cu_seqlens", [[0, 4, 3], [-1, 4], [0, 8], [6, 6]], ids=str)
def test_wrong_offsets_on_a_cpu_raise(cu_seqlens, impl):
    q, k, v, _ = packed([5])
    with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 or more to at most q's 5 tokens, got \["):
        attend(q, k, v, torch.tensor(cu_seqlens, dtype=torch.int32), impl=impl)


@pytest.fixture
def torch_runs(monkeypatch):
    """Replaces torch's FlashAttention by the reference on every device. Records calls; tokens of no segment become NaN."""
    calls = []

    def flash(q, k, v, cu_seqlens, *options, scale):
        causal = options[4]
        calls.append((cu_seqlens, *options, scale))
        out, lse = reference(q.float(), k.float(), v.float(), cu_seqlens, scale, causal, True)
        out, lse = out.to(q.dtype), lse.clone()
        outside = (torch.arange(len(q)) < cu_seqlens[0]) | (torch.arange(len(q)) >= cu_seqlens[-1])
        out[outside], lse[:, outside] = torch.nan, 3.0
        return out, lse, None, None, None

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash)
    for module in (operator_module, attention_libraries):
        monkeypatch.setattr(module, "why_not_flash", lambda q, *_: "float32" if q.dtype == torch.float32 else None)
    return calls


def test_torch_gets_the_arguments_of_the_call(torch_runs):
    q, k, v, cu_seqlens = packed([40, 30], heads=4, key_heads=2)
    out, lse = attend(q, k, v, cu_seqlens, 40, impl="torch", causal=True, softmax_scale=0.1)
    [(offsets_q, offsets_k, longest_q, longest_k, dropout, causal, debug_mask, scale)] = torch_runs
    assert torch.equal(offsets_q, cu_seqlens) and torch.equal(offsets_k, cu_seqlens)
    assert (longest_q, longest_k, dropout, causal, debug_mask, scale) == (40, 40, 0.0, True, False, 0.1)
    exact = reference(q.double(), k.double(), v.double(), cu_seqlens, 0.1, True, True)
    torch.testing.assert_close((out.double(), lse.double()), exact, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("cu_seqlens", [[10, 30, 30, 90, 90], [0, 90], [40, 130], [0, 0]], ids=str)
def test_torch_gives_zero_to_tokens_of_no_segment(torch_runs, cu_seqlens):
    q, k, v, _ = packed([130])
    outside = torch.ones(130, dtype=torch.bool)
    outside[cu_seqlens[0] : cu_seqlens[-1]] = False
    out, lse = attend(q, k, v, torch.tensor(cu_seqlens, dtype=torch.int32), impl="torch")
    assert len(torch_runs) == 1
    assert not out[outside].any() and (lse[:, outside] == -torch.inf).all()
    assert out[~outside].isfinite().all() and lse[:, ~outside].isfinite().all()


def test_torch_accepts_segments(torch_runs):
    q, k, v, cu_seqlens = packed([40, 30])
    plain = attend(q, k, v, cu_seqlens, impl="torch")
    assert_same_bits(attend(q, k, v, Segments.from_lengths([40, 30], CPU), impl="torch"), plain)
    assert len(torch_runs) == 2


def test_torch_cannot_run_on_a_cpu():
    q, k, v, cu_seqlens = packed([40, 30])
    message = "impl='torch' cannot run this varlen_attention: it needs float16 or bfloat16 tensors on a CUDA or ROCm device"
    for given in (cu_seqlens, Segments.from_lengths([40, 30], CPU)):
        with pytest.raises(ValueError, match=message):
            attend(q, k, v, given, impl="torch")
    with pytest.raises(ValueError, match=message):
        torch_attention(q, k, v, cu_seqlens, 40, 0.1, False, False, True)


def test_why_torch_cannot_compute_a_call():
    class OnGpu(torch.Tensor):
        device = torch.device("cuda")

    q, k, v = (torch.zeros(8, 2, 72, dtype=torch.float16).as_subclass(OnGpu) for _ in range(3))
    wide = torch.zeros(8, 2, 75, dtype=torch.float16).as_subclass(OnGpu)[..., :72]
    late = torch.zeros(8, 2, 80, dtype=torch.float16).as_subclass(OnGpu)[..., 1:73]
    cu = offsets([8])
    assert why_not_flash(q, k, v, cu, 8, 0.1) is None
    assert why_not_flash(q.bfloat16(), k.bfloat16(), v.bfloat16(), cu, 8, 0.1) is None
    assert "positive softmax_scale, got 0.0" in why_not_flash(q, k, v, cu, 8, 0.0)
    assert "positive softmax_scale, got -0.1" in why_not_flash(q, k, v, cu, 8, -0.1)
    assert "max_seqlen of at least 2, got 1" in why_not_flash(q, k, v, cu, 1, 0.1)
    assert "strides" in why_not_flash(q, wide, v, cu, 8, 0.1)
    assert "aligned to 16 bytes" in why_not_flash(q, k, late, cu, 8, 0.1)
    assert "got torch.float32" in why_not_flash(q.float(), k.float(), v.float(), cu, 8, 0.1)
    assert "at least one segment" in why_not_flash(q, k, v, cu[:1], 8, 0.1)


@pytest.fixture
def table_says_torch(monkeypatch):
    """A timed table whose entries have backend "torch", on a device where "auto" means Triton."""
    resolve, config = implementation.resolve, launcher.attention_config
    monkeypatch.setattr(operator_module, "resolve", lambda impl, *rest: "triton" if impl == "auto" else resolve(impl, *rest))
    monkeypatch.setattr(launcher, "attention_config", lambda *key: config(*key) | {"backend": "torch"})
    implementation.log_choice.cache_clear()


def test_auto_follows_a_table_where_torch_can_run(torch_runs, table_says_torch, caplog):
    q, k, v, cu_seqlens = packed([40, 30])
    segments = Segments.from_lengths([40, 30], CPU)
    with caplog.at_level(logging.INFO, logger="keye_kernels"):
        for given in (cu_seqlens, segments, cu_seqlens):
            attend(q, k, v, given, impl="auto")
    assert len(torch_runs) == 3
    assert [record.getMessage() for record in caplog.records] == ["varlen_attention on cpu runs impl='torch'"]
    for given in (cu_seqlens, segments):
        out, _ = attend(q.float(), k.float(), v.float(), given, impl="auto")
        assert_same_bits([out], attend(q.float(), k.float(), v.float(), given)[:1])
    assert len(torch_runs) == 3  # not for float32
    # nor for offsets that a compiled graph padded: the library would launch a grid of segments x max_seqlen
    padded = Segments(torch.cat((cu_seqlens, cu_seqlens.new_full((40,), 70))), 70)
    assert_same_bits(attend(q, k, v, padded, impl="auto"), attend(q, k, v, cu_seqlens))
    assert len(torch_runs) == 3


def fail(*_, **__):
    raise AssertionError("a library was called")


def test_triton_never_calls_a_library(table_says_torch, monkeypatch):
    q, k, v, cu_seqlens = packed([40, 30])
    features, grid = torch.randn(16, 16), torch.tensor([[1, 4, 4]])
    weights = [torch.randn(size) for size in ((16,), (16,), (32, 64), (32,), (16, 32), (16,))]
    expected = kk.ops.patch_merge_projection(features, grid, *weights, impl="reference")
    for name in ("linear", "gelu", "layer_norm", "scaled_dot_product_attention"):
        monkeypatch.setattr(torch.nn.functional, name, fail)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", fail)
    monkeypatch.setattr(operator_module, "why_not_flash", lambda *_: None)
    with pytest.raises(AssertionError, match="a library was called"):
        kk.ops.patch_merge_projection(features, grid, *weights, impl="torch")
    for default, impl in (("auto", "triton"), ("triton", "auto")):
        with kk.use_impl(default):
            for given in (cu_seqlens, Segments.from_lengths([40, 30], CPU)):
                attend(q, k, v, given, impl=impl)
            out = kk.ops.patch_merge_projection(features, grid, *weights, impl=impl)
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
