"""The public operators on the reference implementation: exact properties, gradients, registration, errors."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import keye_kernels as kk
from keye_kernels.geometry import VisionBatch
from tests.helpers.operator_calls import CASES, IDS, needs_gradient, projection_arguments, rope_3d_arguments

ALL_UTILS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("grid", [(1, 2, 4), (2, 6, 6), (1, 9, 5), (1, 20, 3)])
def test_position_embedding_matches_interpolate(grid):
    torch.manual_seed(0)
    t, h, w = grid
    table, features = torch.randn(36, 8), torch.randn(t * h * w, 8)
    square = table.view(1, 6, 6, 8).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=(h, w), mode="bilinear", align_corners=False)
    expected = features + resized.permute(0, 2, 3, 1).reshape(h * w, 8).repeat(t, 1)
    found = kk.ops.position_embedding_2d(features, table, torch.tensor([grid]))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_block_order_and_raster_order_give_the_same_output():
    features, *weights = projection_arguments(tokens=2 * 24 + 16)
    grid = torch.tensor([[2, 4, 6], [1, 8, 2]])
    batch = VisionBatch.build(grid, 64, table_side=6)
    raster = kk.ops.patch_merge_projection(features, grid, *weights)
    block = kk.ops.patch_merge_projection(features[batch.raster_index], batch, *weights)
    assert torch.equal(raster, block)
    table = torch.randn(36, 8)
    raster = kk.ops.position_embedding_2d(features, table, grid)
    block = kk.ops.position_embedding_2d(features[batch.raster_index], table, batch)
    assert torch.equal(raster[batch.raster_index], block)


def test_position_0_is_the_identity_and_conjugate_undoes_the_rotation():
    (q, k, positions, inv_freq, sections), _ = rope_3d_arguments()
    same_q, same_k = kk.ops.rope_3d(q, k, torch.zeros_like(positions), inv_freq, sections)
    assert torch.equal(same_q, q) and torch.equal(same_k, k)
    rotated = kk.reference.rope(q, k, positions, inv_freq, sections)
    restored = kk.reference.rope(*rotated, positions, inv_freq, sections, conjugate=True)
    torch.testing.assert_close(restored, (q, k))


def test_attention_ignores_other_segments_and_is_zero_outside_all_segments():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 30, 4, 24).unbind(0)
    cu_seqlens = torch.tensor([2, 9, 9, 20], dtype=torch.int32)
    out, lse = kk.ops.varlen_attention(q, k, v, cu_seqlens, 11, return_lse=True)
    other_k, other_v = k.clone(), v.clone()
    other_k[9:20], other_v[9:20] = 7, 8
    other = kk.ops.varlen_attention(q, other_k, other_v, cu_seqlens, 11)
    assert torch.equal(out[2:9], other[2:9]) and not torch.equal(out[9:20], other[9:20])
    assert out[:2].eq(0).all() and out[20:].eq(0).all() and lse[:, :2].isneginf().all()


@pytest.mark.parametrize("causal", [False, True])
def test_grouped_heads_and_lse_match_the_formula_in_float64(causal):
    torch.manual_seed(0)
    q, k, v = torch.randn(600, 4, 16), torch.randn(600, 2, 16), torch.randn(600, 2, 16)
    cu_seqlens = torch.tensor([0, 600], dtype=torch.int32)
    out, lse = kk.ops.varlen_attention(q, k, v, cu_seqlens, 600, causal=causal, return_lse=True, softmax_scale=0.3)
    key, value = (x.double().repeat_interleave(2, dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q.double(), key) * 0.3
    if causal:
        scores = scores.masked_fill(torch.ones(600, 600).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.double(), torch.einsum("hij,jhd->ihd", scores.softmax(-1), value), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "op", "arguments", "keywords"), CASES, ids=IDS)
def test_opcheck(name, op, arguments, keywords, monkeypatch):
    """opcheck of the registered operator, with the arguments that the public function passes to it."""
    calls = []
    module = __import__(op.__module__, fromlist=["_"])
    for attribute in [a for a in vars(module) if a.endswith("_op") and not a.startswith("_norm")]:
        registered = getattr(module, attribute)
        monkeypatch.setattr(module, attribute, lambda *args, r=registered: calls.append((r, args)) or r(*args))
    op(*arguments, **keywords)
    ((registered, args),) = calls
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        cast = [a.to(dtype).requires_grad_() if needs_gradient(a) else a for a in args]
        # Tracing takes seconds and does not depend on the dtype
        opcheck(registered, cast, test_utils=ALL_UTILS if dtype == torch.float32 else ("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("name", "op", "arguments", "keywords"), CASES, ids=IDS)
def test_compiles_without_graph_breaks(name, op, arguments, keywords):
    if "projection" in name or "positions" in name:
        # Building the geometry reads grid_thw on the host, so a compiled graph takes it as an input
        grid = next(i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor) and a.dtype == torch.int64)
        batch = VisionBatch.build(arguments[grid], 16, table_side=3, order="raster")
        arguments = (*arguments[:grid], batch, *arguments[grid + 1 :])
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments, **keywords), op(*arguments, **keywords))


def test_use_impl_and_the_environment_choose_the_implementation(monkeypatch):
    (q, k, *rest), _ = rope_3d_arguments()
    expected = kk.ops.rope_3d(q, k, *rest, impl="reference")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for chosen_by in ("use_impl", "environment"):
        if chosen_by == "environment":
            monkeypatch.setenv("KEYE_KERNELS_IMPL", "triton")
        with kk.use_impl("triton") if chosen_by == "use_impl" else nullcontext():
            with pytest.raises(ValueError, match=r"impl='triton' of rope_3d .*TRITON_INTERPRET=1"):
                kk.ops.rope_3d(q, k, *rest)
            torch.testing.assert_close(kk.ops.rope_3d(q, k, *rest, impl="reference"), expected)
    monkeypatch.delenv("KEYE_KERNELS_IMPL")
    torch.testing.assert_close(kk.ops.rope_3d(q, k, *rest), expected)
    monkeypatch.setenv("KEYE_KERNELS_IMPL", "fastest")
    with pytest.raises(ValueError, match="KEYE_KERNELS_IMPL must be one of"):
        kk.ops.rope_3d(q, k, *rest)
    with pytest.raises(ValueError, match="impl must be one of"), kk.use_impl("fastest"):
        pass


def test_auto_logs_its_choice_once(caplog):
    from keye_kernels.ops import implementation

    implementation.log_choice.cache_clear()
    (q, k, *rest), _ = rope_3d_arguments()
    with caplog.at_level("INFO", logger="keye_kernels"):
        kk.ops.rope_3d(q, k, *rest)
        kk.ops.rope_3d(q, k, *rest)
    assert [record.getMessage() for record in caplog.records] == ["rope_3d on cpu runs impl='reference'"]


def test_flash_attn_on_a_cpu_raises_with_the_reason():
    q = torch.randn(4, 2, 8)
    with pytest.raises(ValueError, match="impl='flash_attn' cannot run this varlen_attention: it needs float16 or bfloat16"):
        kk.ops.varlen_attention(q, q, q, torch.tensor([0, 4], dtype=torch.int32), 4, impl="flash_attn")
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'reference', 'triton', got 'flash_attn'"):
        kk.ops.rope_2d(q, q, torch.zeros(2, 4, dtype=torch.int64), torch.ones(2), impl="flash_attn")


def invalid_calls():
    (q, k, positions, inv_freq, sections), _ = rope_3d_arguments()
    half = inv_freq[:4]
    flat = positions[:2]
    yield ValueError, "q must have shape", lambda: kk.ops.rope_3d(q[0], k, positions, inv_freq, sections)
    yield ValueError, "k must have shape", lambda: kk.ops.rope_3d(q, k[1:], positions, inv_freq, sections)
    yield TypeError, "k must be a tensor", lambda: kk.ops.rope_3d(q, [1], positions, inv_freq, sections)
    yield TypeError, "q must be float32", lambda: kk.ops.rope_3d(q.long(), k, positions, inv_freq, sections)
    yield ValueError, "position_ids must have shape", lambda: kk.ops.rope_3d(q, k, flat, inv_freq, sections)
    yield TypeError, "position_ids must be int32", lambda: kk.ops.rope_3d(q, k, positions.float(), inv_freq, sections)
    yield TypeError, "inv_freq must be float32", lambda: kk.ops.rope_3d(q, k, positions, inv_freq.half(), sections)
    yield ValueError, "mrope_section must be three", lambda: kk.ops.rope_3d(q, k, positions, inv_freq, [2, 3, 4])
    yield (
        ValueError,
        "k_norm_weight must be given",
        lambda: kk.ops.rope_3d(q, k, positions, inv_freq, sections, q_norm_weight=torch.ones(16)),
    )
    strided = torch.randn(7, 16, 4).transpose(1, 2)
    yield ValueError, "q must be contiguous along", lambda: kk.ops.rope_2d(strided, k, flat, half)
    yield ValueError, "k must be on meta", lambda: kk.ops.rope_2d(q.to("meta"), k, flat, half)
    cu = torch.tensor([0, 7], dtype=torch.int32)
    x = torch.randn(7, 4, 16)
    yield TypeError, "cu_seqlens must be int32", lambda: kk.ops.varlen_attention(x, x, x, cu.long(), 7)
    yield ValueError, "cu_seqlens must have shape", lambda: kk.ops.varlen_attention(x, x, x, cu[None], 7)
    for offsets in ([0, 5, 3, 7], [-1, 7], [0, 8]):
        bad = torch.tensor(offsets, dtype=torch.int32)
        yield ValueError, "cu_seqlens must", lambda bad=bad: kk.ops.varlen_attention(x, x, x, bad, 7)
    yield TypeError, "max_seqlen must be an int", lambda: kk.ops.varlen_attention(x, x, x, cu, 7.0)
    yield ValueError, "multiple of 8", lambda: kk.ops.varlen_attention(x[..., :4], x[..., :4], x[..., :4], cu, 7)
    yield ValueError, "divides the 4 of q", lambda: kk.ops.varlen_attention(x, x[:, :3], x[:, :3], cu, 7)
    yield TypeError, "k must be torch.float32 like q", lambda: kk.ops.varlen_attention(x, x.half(), x.half(), cu, 7)
    features, *weights = projection_arguments()
    grid = torch.tensor([[1, 4, 4]])
    yield (
        ValueError,
        "divisible by 2",
        lambda: kk.ops.patch_merge_projection(features, torch.tensor([[1, 16, 1]]), *weights),
    )
    yield (
        ValueError,
        "32 patches, but 16",
        lambda: kk.ops.patch_merge_projection(features, torch.tensor([[2, 4, 4]]), *weights),
    )
    yield TypeError, "grid_thw must be", lambda: kk.ops.patch_merge_projection(features, [[1, 4, 4]], *weights)
    yield (
        ValueError,
        "norm_weight must have shape",
        lambda: kk.ops.patch_merge_projection(features, grid, weights[0][:5], *weights[1:]),
    )
    yield (
        ValueError,
        "linear_2_weight must have shape",
        lambda: kk.ops.patch_merge_projection(features, grid, *weights[:4], weights[4].T, weights[5]),
    )
    yield ValueError, "table must be a square", lambda: kk.ops.position_embedding_2d(features, torch.randn(7, 8), grid)


@pytest.mark.parametrize(("kind", "message", "call"), list(invalid_calls()), ids=lambda x: x if isinstance(x, str) else "")
def test_invalid_arguments_are_named(kind, message, call):
    with pytest.raises(kind, match=message):
        call()
