"""Options of the operators that change the result: defaults, eps, scale; boundaries of the checks; fake outputs."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import keye_kernels as kk
from keye_kernels import layers
from keye_kernels.geometry import VisionBatch
from keye_kernels.ops import checks
from keye_kernels.ops.checks import check_heads, check_int32_offsets, check_last_axis, check_number
from keye_kernels.segments import Segments
from tests.helpers.operator_calls import projection_arguments, rope_3d_arguments

IMPLS = pytest.mark.parametrize("impl", ["reference", "triton"])
GRID = torch.tensor([[1, 4, 4]])
FLOAT32 = {"atol": 1e-5, "rtol": 1e-5}


def small_heads():
    """Arguments of rope_3d whose heads have mean squares around the default eps, and norm weights."""
    (q, k, *rest), weights = rope_3d_arguments(norm=True)
    return (1e-3 * q, 1e-3 * k, *rest), weights


def normed_and_rotated(arguments, weights, eps):
    q, k, *rest = arguments
    rms = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) for x in (q, k))
    q, k = (x * weight for x, weight in zip(rms, weights.values(), strict=True))
    return kk.ops.rope_3d(q, k, *rest, impl="reference")


@IMPLS
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns about the masked rows where eps is 0
@pytest.mark.parametrize("eps", [None, 0.0, 1e-6, 1e-2])
def test_eps_of_the_norm_of_heads(eps, impl):
    """The default is 1e-6, as in the models."""
    arguments, weights = small_heads()
    found = kk.ops.rope_3d(*arguments, **weights, impl=impl, **({} if eps is None else {"eps": eps}))
    expected = normed_and_rotated(arguments, weights, 1e-6 if eps is None else eps)
    torch.testing.assert_close(found, expected, **FLOAT32)


@IMPLS
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_gradients_use_the_eps_of_the_call(eps, impl):
    arguments, weights = small_heads()
    (q, k, *rest), weights = arguments, {name: weight.requires_grad_() for name, weight in weights.items()}
    leaves = q.requires_grad_(), k.requires_grad_(), *weights.values()
    gradients = []
    for outputs in (kk.ops.rope_3d(q, k, *rest, **weights, eps=eps, impl=impl), normed_and_rotated(arguments, weights, eps)):
        gradients.append(torch.autograd.grad(sum((x * torch.arange(16.0)).sum() for x in outputs), leaves))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_second_order_gradients_use_the_eps_of_the_call(eps):
    arguments, weights = small_heads()
    (q, k, *rest), weights = arguments, {name: weight.requires_grad_() for name, weight in weights.items()}
    leaves = q.requires_grad_(), k.requires_grad_(), *weights.values()
    found = []
    for outputs in (kk.ops.rope_3d(q, k, *rest, **weights, eps=eps), normed_and_rotated(arguments, weights, eps)):
        first = torch.autograd.grad(sum(x.sin().sum() for x in outputs), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(x.square().sum() for x in first) * 1e-6, leaves))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3 * float(y.abs().max()))


@pytest.mark.parametrize("operator", ["rope_2d", "rope_3d", "rope_3d with norms"])
def test_the_backward_pass_runs_the_implementation_of_the_call(operator, monkeypatch):
    """Without norms it is the kernel that rotates back; an explicit reference is not replaced."""
    from keye_kernels.triton import rope

    (q, k, positions, inv_freq, sections), weights = rope_3d_arguments(norm=True)
    calls, run = [], rope.rope
    monkeypatch.setattr(rope, "rope", lambda *arguments: calls.append(arguments[-1]) or run(*arguments))
    q.requires_grad_()
    for impl, conjugates in (("triton", [False, True]), ("reference", [])):
        if operator == "rope_2d":
            out, _ = kk.ops.rope_2d(q, k, positions[:2], inv_freq[:4], impl=impl)
        else:
            options = weights if "norms" in operator else {}
            out, _ = kk.ops.rope_3d(q, k, positions, inv_freq, sections, **options, impl=impl)
        out.sum().backward()
        assert calls == conjugates
        calls.clear()


@IMPLS
@pytest.mark.parametrize("eps", [None, 1e-5, 1e-1])
@pytest.mark.parametrize("after_merge", [False, True])
def test_eps_of_the_projector(after_merge, eps, impl):
    """The default is 1e-5, as in the models."""
    features, *weights = projection_arguments(after_merge=after_merge)
    features *= 3e-3  # a variance near the default eps
    options, value = ({}, 1e-5) if eps is None else ({"eps": eps}, eps)
    batch = VisionBatch.build(GRID, 16, table_side=3)
    out = kk.ops.patch_merge_projection(features, batch, *weights, impl=impl, **options)
    norm, w1, b1, w2, b2 = weights[:2], *weights[2:]
    rows = F.layer_norm(features.view(-1, len(norm[0])), norm[0].shape, *norm, value).view(4, -1)
    torch.testing.assert_close(out, F.linear(F.gelu(F.linear(rows, w1, b1)), w2, b2), atol=1e-4, rtol=1e-4)


@IMPLS
def test_defaults_of_attention(impl):
    """Scale D ** -0.5, no mask, no lse; the scale of the call otherwise, also an integer."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 9, 2, 8).unbind(0)
    cu_seqlens = torch.tensor([0, 9], dtype=torch.int32)
    for scale, causal in ((None, False), (2, False), (0.5, True)):
        options = {} if scale is None else {"softmax_scale": scale, "causal": causal}
        out = kk.ops.varlen_attention(q, k, v, cu_seqlens, 9, impl=impl, **options)
        scores = torch.einsum("ihd,jhd->hij", q, k) * (8**-0.5 if scale is None else scale)
        if causal:
            scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
        torch.testing.assert_close(out, torch.einsum("hij,jhd->ihd", scores.softmax(-1), v), **FLOAT32)


def test_layers_use_eps_and_merge_size_of_their_module():
    torch.manual_seed(0)
    for merge_size, eps in ((2, 1e-1), (1, 1e-5), (3, 1.0)):
        width = 4 * merge_size**2
        norm = torch.nn.LayerNorm(4, eps=eps)
        linear_1, linear_2 = torch.nn.Linear(width, 6), torch.nn.Linear(6, 5)
        for parameter in norm.parameters():
            torch.nn.init.normal_(parameter)
        x = torch.randn(36, 4)
        expected = linear_2(F.gelu(linear_1(norm(x).view(-1, width))))
        module = torch.nn.Module()
        module.ln_q = module.norm = module.pre_norm = norm
        module.mlp = torch.nn.Sequential(linear_1, torch.nn.GELU(), linear_2)
        module.linear_fc1, module.linear_fc2 = module.linear_1, module.linear_2 = linear_1, linear_2
        for layer in (layers.Qwen2VLPatchMerger, layers.Qwen3VLPatchMerger):
            torch.testing.assert_close(layer.forward(module, x), expected, **FLOAT32)
        if merge_size == 2:
            grid = torch.tensor([[9, 2, 2]])  # frames of one block: raster order is block order
            torch.testing.assert_close(layers.KeyeProjector.forward(module, x, grid), expected, **FLOAT32)


def test_layers_tell_which_of_them_compile():
    """The projector reads grids on the CPU."""
    flags = {name: (getattr(layers, name).has_backward, getattr(layers, name).can_torch_compile) for name in layers.__all__}
    assert flags == {name: (True, name != "KeyeProjector") for name in flags}


@pytest.mark.parametrize("merge_size", [1, 2, 3])
def test_the_fake_projector_has_the_shapes_of_the_real_one(merge_size):
    torch.manual_seed(0)
    width = 2 * merge_size**2
    weights = [torch.randn(size) for size in ((2,), (2,), (6, width), (6,), (5, 6), (5,))]
    arguments = torch.randn(36, 2), None, *weights, merge_size, 1e-5, "reference"
    opcheck(torch.ops.keye_kernels.patch_merge_projection.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_batch_of_another_number_of_patches_is_refused():
    features, *weights = projection_arguments()
    batch = VisionBatch.build(torch.tensor([[1, 4, 2]]), 8, table_side=3)
    with pytest.raises(ValueError, match="grid_thw describes 8 patches, but features has 16 rows"):
        kk.ops.patch_merge_projection(features, batch, *weights)
    with pytest.raises(ValueError, match="grid_thw describes 8 patches, but features has 16 rows"):
        kk.ops.position_embedding_2d(features, torch.randn(9, 8), batch)
    with pytest.raises(ValueError, match="grid_thw describes 8 patches, but 16 patches were given"):
        kk.ops.position_embedding_2d(features, torch.randn(9, 8), torch.tensor([[1, 4, 2]]))


def test_position_embeddings_need_no_even_grids():
    out = kk.ops.position_embedding_2d(torch.zeros(15, 2), torch.ones(4, 2), torch.tensor([[1, 3, 5]]))
    torch.testing.assert_close(out, torch.ones(15, 2))


@pytest.mark.parametrize("wrong", [1, 2, 3, 4, 5, 6])
def test_every_weight_of_the_projector_is_checked(wrong):
    arguments = projection_arguments()
    names = ("norm_weight", "norm_bias", "linear_1_weight", "linear_1_bias", "linear_2_weight", "linear_2_bias")
    changed = {
        "shape": (ValueError, lambda x: torch.cat((x, x), dim=-1)),
        "dtype": (TypeError, lambda x: x.long()),
        "device": (ValueError, lambda x: x.to("meta")),
        "type": (TypeError, lambda x: x.tolist()),
    }
    for what, (kind, change) in changed.items():
        given = [change(x) if i == wrong else x for i, x in enumerate(arguments)]
        if names[wrong - 1] == "norm_weight" and what == "shape":
            given[wrong] = torch.ones(9)
        with pytest.raises(kind, match=f"{names[wrong - 1]} must"):
            kk.ops.patch_merge_projection(given[0], GRID, *given[1:])


def test_both_norm_weights_are_checked():
    arguments, weights = rope_3d_arguments(norm=True)
    for name in weights:
        for value, message in ((torch.ones(15), "must have shape"), (torch.ones(16).to("meta"), "must be on cpu")):
            with pytest.raises(ValueError, match=f"{name} {message}"):
                kk.ops.rope_3d(*arguments, **weights | {name: value})
        with pytest.raises(ValueError, match=f"{name} must be given when the other norm weight is"):
            kk.ops.rope_3d(*arguments, **weights | {name: None})


def test_boundaries_of_attention():
    cu_seqlens = torch.tensor([0, 3], dtype=torch.int32)
    for head_dim, is_valid in ((8, True), (256, True), (264, False), (12, False), (0, False)):
        x = torch.randn(3, 1, head_dim)
        if is_valid:
            assert kk.ops.varlen_attention(x, x, x, cu_seqlens, 3).shape == x.shape
            continue
        with pytest.raises(ValueError, match="q must have a head dim that is a multiple of 8 up to 256"):
            kk.ops.varlen_attention(x, x, x, cu_seqlens, 3)
    x, wide = torch.randn(3, 2, 8), torch.randn(3, 4, 8)
    with pytest.raises(ValueError, match="v must have shape"):
        kk.ops.varlen_attention(wide, wide, x, cu_seqlens, 3)
    with pytest.raises(ValueError, match="k must have a number of heads that divides the 2 of q, got 4"):
        kk.ops.varlen_attention(x, wide, wide, cu_seqlens, 3)
    with pytest.raises(TypeError, match="v must be float32, got"):
        kk.ops.varlen_attention(x, x, x.half(), cu_seqlens, 3)
    with pytest.raises(ValueError, match=r"cu_seqlens must have shape \[num_segments \+ 1\], got \[0\]"):
        kk.ops.varlen_attention(x, x, x, cu_seqlens[:0], 3)
    kk.ops.varlen_attention(x, x, x, cu_seqlens, 2**31 - 1)
    for tokens, is_valid in ((3, True), (4, False)):
        segments = Segments(torch.tensor([0, tokens], dtype=torch.int32), tokens)
        if is_valid:
            kk.ops.varlen_attention(x, x, x, segments)
            continue
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 or more to at most q's 3 tokens"):
            kk.ops.varlen_attention(x, x, x, segments)


def test_boundaries_of_rope():
    (q, k, positions, inv_freq, _), _ = rope_3d_arguments()
    for section in ([8, 0, 0], (0, 0, 8)):
        kk.ops.rope_3d(q, k, positions, inv_freq, section)
    for section in ([-1, 5, 4], [4, 4], [4, 4, 0, 0], [3, 3, 3]):
        with pytest.raises(ValueError, match="mrope_section must be three numbers adding up to D/2 = 8"):
            kk.ops.rope_3d(q, k, positions, inv_freq, section)
    with pytest.raises(ValueError, match="q must have a head dim divisible by 4, got 6"):
        kk.ops.rope_2d(q[..., :6], k[..., :6], positions[:2], inv_freq[:1])
    for given in (inv_freq[:4], torch.cat((inv_freq, inv_freq))):
        with pytest.raises(ValueError, match="inv_freq must have shape"):
            kk.ops.rope_3d(q, k, positions, given, [2, 3, 3])
    with pytest.raises(ValueError, match="inv_freq must have shape"):
        kk.ops.rope_2d(q, k, positions[:2], inv_freq)


def test_boundaries_of_the_checks():
    largest = torch.finfo(torch.float32).max
    check_number("x", 0, minimum=0), check_number("x", -largest), check_number("x", largest)
    with pytest.raises(ValueError, match="x must be a finite number"):
        check_number("x", -1.001 * largest)
    for value in (-1e-300, 1.001 * largest, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="x must be a number"):
            check_number("x", value, "a number", minimum=0)

    def of_size(elements):
        return torch.zeros(1).expand(elements)

    check_int32_offsets("x", of_size(2**31 - 1))
    with pytest.raises(ValueError, match=r"x must have fewer than 2\*\*31 elements"):
        check_int32_offsets("x", of_size(2**31))
    check_last_axis("x", torch.zeros(4, 2)[:, ::2])  # the stride of one element does not matter
    with pytest.raises(ValueError, match="x must be contiguous along its last axis"):
        check_last_axis("x", torch.zeros(4, 4)[:, ::2])
    for x in (torch.zeros(3, 2), torch.zeros(3, 2, 8, 1), torch.zeros(4, 2, 8), torch.zeros(3, 2, 16)):
        with pytest.raises(ValueError, match="k must have shape"):
            check_heads("k", x, like=torch.zeros(3, 4, 8))
    assert checks.MAX_INT32 == 2**31 - 1 and importlib.import_module("keye_kernels.ops.varlen_attention").MAX_HEAD_DIM == 256
