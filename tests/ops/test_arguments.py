"""Arguments that operators must refuse, and values that must not be hidden (NaN, empty tensors)."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import keye_kernels as kk
from keye_kernels.geometry import VisionBatch
from keye_kernels.segments import Segments
from tests.helpers.operator_calls import projection_arguments, rope_3d_arguments

IMPLS = pytest.mark.parametrize("impl", ["reference", "triton"])
NOT_NUMBERS_OF_A_NORM = [math.nan, math.inf, -1e-6, "1e-6", None, True]
CU_SEQLENS = torch.tensor([0, 7], dtype=torch.int32)
GRID_16 = torch.tensor([[1, 4, 4]])


def heads(count=2, tokens=7, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(tokens, count, 16).to(dtype)


def attend(q, k, v, **options):
    return kk.ops.varlen_attention(q, k, v, CU_SEQLENS, 7, **options)


def with_value(x, index, value):
    x = x.clone()
    x[index] = value
    return x


@IMPLS
@pytest.mark.parametrize("scale", [-1.5, 0.0, -0.0])
def test_causal_attention_with_a_scale_that_is_not_positive(impl, scale):
    q, k, v = heads(), heads() + 1, heads() - 1
    scores = (scale * torch.einsum("qhd,khd->hqk", q, k)).masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
    expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    torch.testing.assert_close(attend(q, k, v, softmax_scale=scale, causal=True, impl=impl), expected)


@IMPLS
@pytest.mark.parametrize("scale", [1e39, -1e39, 1e308])
def test_a_scale_that_is_infinite_in_float32_is_rejected(impl, scale):
    with pytest.raises(ValueError, match="softmax_scale must be a finite number"):
        attend(heads(), heads(), heads(), softmax_scale=scale, impl=impl)


def test_norm_weights_of_the_projection_may_have_other_dtypes():
    features, *weights = projection_arguments()
    expected = kk.ops.patch_merge_projection(features, GRID_16, *weights, impl="reference")
    for index in (0, 1):
        mixed = [weight.double() if i == index else weight for i, weight in enumerate(weights)]
        for impl in ("reference", "triton"):
            found = kk.ops.patch_merge_projection(features, GRID_16, *mixed, impl=impl)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@IMPLS
@pytest.mark.parametrize("index", range(2, 6))
def test_linear_layers_of_the_projection_have_the_dtype_of_the_features(impl, index):
    features, *weights = projection_arguments()
    weights[index] = weights[index].half()
    name = ("linear_1_weight", "linear_1_bias", "linear_2_weight", "linear_2_bias")[index - 2]
    with pytest.raises(TypeError, match=f"{name} must be float32, got torch.float16"):
        kk.ops.patch_merge_projection(features, GRID_16, *weights, impl=impl)


@pytest.mark.parametrize("name", ["causal", "return_lse"])
@pytest.mark.parametrize("value", [1, None, "x", object()], ids=["1", "None", "x", "object"])
def test_flags_of_attention_must_be_booleans(name, value):
    with pytest.raises(TypeError, match=f"{name} must be True or False"):
        attend(heads(), heads(), heads(), **{name: value})


@pytest.mark.parametrize("name", ["q", "k", "position_ids", "inv_freq"])
@pytest.mark.parametrize("operator", ["rope_2d", "rope_3d"])
def test_rope_names_an_argument_that_is_no_dense_tensor(operator, name):
    (q, k, position_ids, inv_freq, section), _ = rope_3d_arguments()
    arguments = {"q": q, "k": k, "position_ids": position_ids, "inv_freq": inv_freq}
    if operator == "rope_2d":
        arguments |= {"position_ids": position_ids[:2], "inv_freq": inv_freq[: q.shape[-1] // 4]}
    sections = {"mrope_section": section} if operator == "rope_3d" else {}
    for wrong in (None, arguments[name].to_sparse()):
        with pytest.raises(TypeError, match=f"{name} must be a"):
            getattr(kk.ops, operator)(**{**arguments, name: wrong}, **sections)


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [(impl, dtype) for impl in ("reference", "triton") for dtype in (torch.float32, torch.float16)]
    + [("reference", torch.float64)],
    ids=str,
)
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns about the NaN
def test_attention_does_not_hide_a_query_that_is_not_finite(value, grad, dtype, impl):
    q, k, v = (heads(dtype=dtype).requires_grad_(grad) for _ in range(3))
    cu_seqlens = torch.tensor([0, 5, 7], dtype=torch.int32)
    expected = kk.ops.varlen_attention(q, k, v, cu_seqlens, 5, impl=impl)
    poisoned = with_value(q, (3, 1, 2), value)
    out, lse = kk.ops.varlen_attention(poisoned, k, v, cu_seqlens, 5, impl=impl, return_lse=True)
    assert out[3, 1].isnan().all() and not lse[1, 3].isfinite()
    kept = [0, 1, 2, 4]
    torch.testing.assert_close(out[kept], expected[kept], atol=4 * torch.finfo(dtype).eps, rtol=0)
    assert out[3, 0].isfinite().all() and torch.equal(out[5:], expected[5:])


@IMPLS
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_attention_does_not_hide_a_key_that_is_nan(impl):
    q, k, v = heads(), heads(), heads()
    out = attend(q, with_value(k, (0, 1, 2), math.nan), v, causal=True, impl=impl)  # the first query attends to this key only
    assert out[:, 1].isnan().all() and out[:, 0].isfinite().all()


def test_gradients_of_attention_do_not_hide_nan():
    q, k, v = (heads().requires_grad_() for _ in range(3))
    poisoned = with_value(q, (3, 1, 2), math.nan)
    grads = torch.autograd.grad(attend(poisoned, k, v).sum(), [q, k, v])
    assert all(grad[:, 1].isnan().any() and grad[:, 0].isfinite().all() for grad in grads)


@IMPLS
@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_softmax_scale_must_be_finite(scale, impl):
    with pytest.raises(ValueError, match=f"softmax_scale must be a finite number, got {scale}"):
        attend(heads(), heads(), heads(), softmax_scale=scale, impl=impl)
    with pytest.raises(TypeError, match="softmax_scale must be a finite number, got '1'"):
        attend(heads(), heads(), heads(), softmax_scale="1", impl=impl)


@IMPLS
def test_attention_needs_heads_and_a_valid_max_seqlen(impl):
    with pytest.raises(ValueError, match="q must have at least one head, got shape"):
        attend(heads(0), heads(), heads(), impl=impl)
    for max_seqlen in (-1, 2**31):
        with pytest.raises(ValueError, match=f"max_seqlen must be from 0 to 2147483647, got {max_seqlen}"):
            kk.ops.varlen_attention(heads(), heads(), heads(), CU_SEQLENS, max_seqlen, impl=impl)
    with pytest.raises(TypeError, match="max_seqlen must be an int, got bool"):
        kk.ops.varlen_attention(heads(), heads(), heads(), CU_SEQLENS, True, impl=impl)
    with pytest.raises(ValueError, match="cu_seqlens must be on cpu like the other tensors, got meta"):
        kk.ops.varlen_attention(heads(), heads(), heads(), CU_SEQLENS.to("meta"), 7, impl=impl)


@pytest.mark.parametrize("eps", NOT_NUMBERS_OF_A_NORM, ids=repr)
def test_eps_must_be_finite_and_not_negative(eps):
    arguments, weights = rope_3d_arguments(norm=True)
    kind = TypeError if isinstance(eps, str | bool | None) else ValueError
    with pytest.raises(kind, match=f"eps must be a finite number of at least 0, got {eps!r}"):
        kk.ops.rope_3d(*arguments, **weights, eps=eps)
    features, *weights = projection_arguments()
    with pytest.raises(kind, match=f"eps must be a finite number of at least 0, got {eps!r}"):
        kk.ops.patch_merge_projection(features, torch.tensor([[1, 4, 4]]), *weights, eps=eps)


@pytest.mark.parametrize("section", [(2.0, 3.0, 3.0), None, "233", (True, 3, 4), np.array([2, 3, 3])], ids=repr)
def test_mrope_section_must_be_integers(section):
    (q, k, positions, inv_freq, _), _ = rope_3d_arguments()
    with pytest.raises(TypeError, match="mrope_section must be a list of three integers, got"):
        kk.ops.rope_3d(q, k, positions, inv_freq, section)


@IMPLS
def test_rope_without_heads_is_empty_and_without_channels_is_refused(impl):
    (q, k, positions, inv_freq, sections), _ = rope_3d_arguments()
    assert kk.ops.rope_3d(q[:, :0], k, positions, inv_freq, sections, impl=impl)[0].shape == (7, 0, 16)
    with pytest.raises(ValueError, match="q must have a positive even head dim, got 0"):
        kk.ops.rope_3d(q[..., :0], k[..., :0], positions, inv_freq[:0], [0, 0, 0], impl=impl)
    with pytest.raises(ValueError, match="q must have a positive even head dim, got 0"):
        kk.ops.rope_2d(q[..., :0], k[..., :0], positions[:2], inv_freq[:0], impl=impl)


def test_norm_weights_may_have_any_stride():
    arguments, weights = rope_3d_arguments(norm=True)
    strided = {name: torch.stack((weight, -weight), dim=1)[:, 0] for name, weight in weights.items()}
    found = kk.ops.rope_3d(*arguments, **strided, impl="triton")
    torch.testing.assert_close(found, kk.ops.rope_3d(*arguments, **weights, impl="triton"), rtol=0, atol=0)


@pytest.mark.parametrize("merge_size", [0, -2, 2.0, True, None])
def test_merge_size_must_be_a_positive_integer(merge_size):
    features, *weights = projection_arguments()
    with pytest.raises((ValueError, TypeError), match=f"merge_size must be a positive int, got {merge_size}"):
        kk.ops.patch_merge_projection(features, torch.tensor([[1, 4, 4]]), *weights, merge_size=merge_size)


def test_merge_size_must_be_that_of_the_batch():
    features, *weights = projection_arguments()
    for order in ("block", "raster"):
        batch = VisionBatch.build(torch.tensor([[1, 4, 4]]), 16, table_side=3, merge_size=1, order=order)
        with pytest.raises(ValueError, match="merge_size must be 1 as in the VisionBatch, got 2"):
            kk.ops.patch_merge_projection(features, batch, *weights)


@IMPLS
def test_features_need_channels(impl):
    features, *weights = projection_arguments(channels=0)
    with pytest.raises(ValueError, match="features must have at least one channel, got shape"):
        kk.ops.patch_merge_projection(features, torch.tensor([[1, 4, 4]]), *weights, impl=impl)


@IMPLS
@pytest.mark.parametrize("rows", [0, 7])
def test_table_must_be_a_square_grid(rows, impl):
    with pytest.raises(ValueError, match=f"table must be a square grid of position embeddings, got {rows} rows"):
        kk.ops.position_embedding_2d(torch.randn(24, 8), torch.randn(rows, 8), torch.tensor([[1, 4, 6]]), impl=impl)


@IMPLS
@pytest.mark.parametrize("rows", [0, 4, 80, 100])
def test_table_must_have_the_size_of_the_batch(rows, impl):
    batch = VisionBatch.build(torch.tensor([[1, 4, 6]]), 24, table_side=9)
    with pytest.raises(ValueError, match=f"table must have 81 rows, because the VisionBatch has table_side=9, got {rows} rows"):
        kk.ops.position_embedding_2d(torch.randn(24, 8), torch.randn(rows, 8), batch, impl=impl)


@pytest.mark.parametrize("field", ["corner_index", "merge_index"])
@pytest.mark.parametrize("value", [-1, 10**8])
def test_indices_out_of_range_are_refused(field, value):
    """In the interpreter a kernel would end the process, because it reads memory of others."""
    features, *weights = projection_arguments()
    batch = VisionBatch.build(torch.tensor([[1, 4, 4]]), 16, table_side=3, order="raster")
    changed = getattr(batch, field).clone()
    changed[-1, -1] = value
    batch = replace(batch, **{field: changed})
    with pytest.raises(ValueError, match=f"{field} must be from 0 to"):
        kk.ops.position_embedding_2d(features, torch.randn(9, features.shape[1]), batch, impl="triton")
        kk.ops.patch_merge_projection(features, batch, *weights, impl="triton")


@IMPLS
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("corner_index", torch.zeros(16, 1, dtype=torch.int32)),
        ("corner_weight", torch.ones(3, 4)),
        ("merge_index", torch.zeros(1, 4, dtype=torch.int32)),
    ],
)
def test_tensors_of_a_batch_have_its_size(field, value, impl):
    features, *weights = projection_arguments()
    batch = replace(VisionBatch.build(torch.tensor([[1, 4, 4]]), 16, table_side=3, order="raster"), **{field: value})
    with pytest.raises(ValueError, match=f"{field} must have shape"):
        kk.ops.position_embedding_2d(features, torch.randn(9, features.shape[1]), batch, impl=impl)
        kk.ops.patch_merge_projection(features, batch, *weights, impl=impl)


@pytest.mark.parametrize("lengths", [(9, -2), (7,), (3, 2, 2)])
def test_lengths_of_segments_fit_their_offsets(lengths):
    with pytest.raises(ValueError, match="lengths must be"):
        Segments(torch.tensor([0, 5, 7], dtype=torch.int32), 9, lengths)


def test_tensors_beyond_32_bit_offsets_are_refused():
    def huge(*shape):  # one element of memory
        return torch.zeros(1).expand(shape)

    with pytest.raises(ValueError, match=r"table must have fewer than 2\*\*31 elements, got shape \[1048576, 2048\]"):
        kk.ops.position_embedding_2d(torch.zeros(24, 2048), huge(2**20, 2048), torch.tensor([[1, 4, 6]]))
    features, *weights = projection_arguments()
    weights[2:5] = [huge(2**26, 32), huge(2**26), huge(12, 2**26)]
    with pytest.raises(ValueError, match=r"linear_1_weight must have fewer than 2\*\*31 elements, got shape"):
        kk.ops.patch_merge_projection(features, torch.tensor([[1, 4, 4]]), *weights)


def test_numbers_that_change_do_not_break_a_compiled_graph():
    """torch.compile makes a float that changes symbolic, and cannot trace every check of it."""
    (q, k, *rest), weights = rope_3d_arguments(norm=True)
    rope = torch.compile(lambda eps: kk.ops.rope_3d(q, k, *rest, **weights, eps=eps), fullgraph=True, backend="eager")
    attention = torch.compile(lambda scale: attend(q, k, k, softmax_scale=scale), fullgraph=True, backend="eager")
    for number in (0.1, 0.2, 0.3):
        torch.testing.assert_close(rope(number), kk.ops.rope_3d(q, k, *rest, **weights, eps=number))
        torch.testing.assert_close(attention(number), attend(q, k, k, softmax_scale=number))


def test_grid_thw_must_be_integers():
    features, *weights = projection_arguments()
    for dtype in (torch.float32, torch.complex64, torch.bool):
        with pytest.raises(ValueError, match="grid_thw must be integer"):
            kk.ops.patch_merge_projection(features, torch.tensor([[1, 4, 4]]).to(dtype), *weights)
