"""Gradients of the public operators: first and second order in reverse mode; forward mode raises."""

import pytest
import torch
from torch.autograd import forward_ad

import keye_kernels as kk
from tests.helpers.operator_calls import CASES, IDS, needs_gradient, rope_3d_arguments

EVERY_CASE = pytest.mark.parametrize(("name", "op", "arguments", "keywords"), CASES, ids=IDS)


def as_function(op, arguments, keywords):
    """The operator as a function of its float64 tensors, and these tensors as leaves that require gradients."""
    keywords = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
    named = [k for k, v in keywords.items() if needs_gradient(v)]
    indices = [i for i, x in enumerate(arguments) if needs_gradient(x)]

    def call(*leaves):
        changed = list(arguments)
        for i, leaf in zip(indices, leaves, strict=False):
            changed[i] = leaf
        return op(*changed, **{**keywords, **dict(zip(named, leaves[len(indices) :], strict=True))})

    leaves = [*(arguments[i] for i in indices), *(keywords[k] for k in named)]
    return call, [x.clone().requires_grad_() for x in leaves]


@EVERY_CASE
def test_gradients_match_finite_differences(name, op, arguments, keywords):
    assert torch.autograd.gradcheck(*as_function(op, arguments, keywords))


@EVERY_CASE
def test_second_order_gradients_match_finite_differences(name, op, arguments, keywords):
    # fast_mode compares one random projection of the Jacobian: the whole one takes minutes
    assert torch.autograd.gradgradcheck(*as_function(op, arguments, keywords), fast_mode=True)


def test_one_tensor_as_query_key_and_value_has_the_gradients_of_all_three():
    torch.manual_seed(0)
    x, cu_seqlens = torch.randn(5, 2, 8, dtype=torch.float64, requires_grad=True), torch.tensor([0, 2, 5], dtype=torch.int32)

    def call(x):
        return kk.ops.varlen_attention(x, x, x, cu_seqlens, 3)

    assert torch.autograd.gradcheck(call, [x]) and torch.autograd.gradgradcheck(call, [x], fast_mode=True)


def packed_attention(x):
    """Attention of x with itself in the segments [0, 2) and [2, 5), by its definition."""
    scores = [torch.einsum("ihd,jhd->hij", part, part) * part.shape[2] ** -0.5 for part in (x[:2], x[2:])]
    parts = zip(scores, (x[:2], x[2:]), strict=True)
    return torch.cat([torch.einsum("hij,jhd->ihd", score.softmax(-1), part) for score, part in parts])


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda x: kk.ops.varlen_attention(x, x, x, torch.tensor([0, 2, 5], dtype=torch.int32), 3), packed_attention),
        (lambda x: kk.ops.silu_mul(x[:, 0], x[:, 0]), lambda x: torch.nn.functional.silu(x[:, 0]) * x[:, 0]),
        (lambda x: kk.ops.silu_mul(x.flatten(1), x.flatten(1)), lambda x: (torch.nn.functional.silu(x) * x).flatten(1)),
    ],
    ids=["attention", "silu_mul of a view", "silu_mul"],
)
@pytest.mark.parametrize("create_graph", [False, True])
def test_one_tensor_as_several_inputs_has_the_gradients_of_the_definition(call, expected, create_graph):
    """gradgradcheck does not compare the first-order gradients that create_graph=True gives with anything."""
    torch.manual_seed(0)
    x = torch.randn(5, 2, 8, dtype=torch.float64, requires_grad=True)
    found, wanted = (torch.autograd.grad(f(x).square().sum(), x, create_graph=create_graph)[0] for f in (call, expected))
    torch.testing.assert_close(found, wanted)
    if create_graph:
        second, wanted = (torch.autograd.grad(grad.square().sum(), x)[0] for grad in (found, wanted))
        torch.testing.assert_close(second, wanted)


def test_one_leaf_as_both_inputs_has_the_gradients_of_the_definition():
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    calls = kk.ops.silu_mul(x, x), torch.nn.functional.silu(x) * x
    found, wanted = (torch.autograd.grad(out.square().sum(), x, create_graph=True)[0] for out in calls)
    torch.testing.assert_close(found, wanted)


@EVERY_CASE
def test_forward_mode_raises(name, op, arguments, keywords):
    call, leaves = as_function(op, arguments, keywords)
    leaves = [x.detach() for x in leaves]
    with forward_ad.dual_level():
        call(*leaves)  # no tangent
        for grad_mode in (torch.enable_grad, torch.no_grad):
            with grad_mode(), pytest.raises(NotImplementedError, match="has no forward-mode gradient; use reverse mode"):
                call(forward_ad.make_dual(leaves[0], leaves[0]), *leaves[1:])
    with pytest.raises(NotImplementedError, match="has no forward-mode gradient; use reverse mode"):
        torch.func.jvp(call, tuple(leaves), tuple(leaves))


def test_frequencies_that_require_a_gradient_are_refused():
    (q, k, positions, inv_freq, sections), _ = rope_3d_arguments()
    with pytest.raises(ValueError, match="inv_freq must not require a gradient"):
        kk.ops.rope_3d(q, k, positions, inv_freq.requires_grad_(), sections)
    with pytest.raises(ValueError, match="inv_freq must not require a gradient"):
        kk.ops.rope_2d(q, k, positions[:2], inv_freq[:4], impl="reference")
