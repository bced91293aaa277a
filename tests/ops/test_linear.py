"""Linear layers on a CPU: the numbers of `F.linear`, whichever method computes them."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from keye_kernels.model.linear import Linear
from keye_kernels.ops.linear import linear
from keye_kernels.reference import linear as reference
from tests.helpers.tiny import prompt, tiny_model

# Allowed error relative to the largest output. A sum of 2048 float32 products has a rounding error of about sqrt(2048) / 2 eps =
# 3e-6 standard deviations of the output. Among 2^16 outputs, the largest error and the largest output are both about 4 of their
# own standard deviations, so their ratio is 3e-6 as well.
FP32 = 3e-6
LARGE = (1024, 2048)  # above MIN_MULTIPLY_ADDS for any number of rows: one row runs as a split GEMV, more rows run in oneDNN


def make_inputs(rows, out=LARGE[0], width=LARGE[1], dtype=torch.float32, leading=()):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((*leading, rows, width), (out, width), (out,)))
    return x.to(dtype), (weight * width**-0.5).to(dtype), bias.to(dtype)


def assert_close(found, x, weight, bias):
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert found.shape == exact.shape and found.dtype == x.dtype
    assert (found - exact).abs().max() <= FP32 * exact.abs().max()


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 64], ids=lambda rows: f"M{rows}")
@pytest.mark.parametrize("sizes", [(2048, 1024), LARGE, (1031, 2048), (24, 40), (1, 1)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_matches_float64(sizes, rows, with_bias):
    x, weight, bias = make_inputs(rows, *sizes)
    bias = bias if with_bias else None
    found = reference(x, weight, bias)
    if rows:
        assert_close(found, x, weight, bias)
    assert found.shape == (rows, sizes[0])


@pytest.mark.parametrize("leading", [(1,), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize("rows", [1, 4])
def test_leading_dimensions_are_kept(leading, rows):
    x, weight, bias = make_inputs(rows, leading=leading)
    assert_close(reference(x, weight, bias), x, weight, bias)


def test_strided_inputs_match_and_are_not_modified():
    x, weight, bias = make_inputs(6)
    wide = torch.randn(6, 3 * LARGE[1])
    before = wide[:, 5 : 5 + LARGE[1]].copy_(x).clone()
    assert_close(reference(wide[:, 5 : 5 + LARGE[1]], weight, bias), x, weight, bias)
    assert_close(reference(x.t().contiguous().t(), weight, bias), x, weight, bias)
    assert_close(reference(x, weight.t().contiguous().t(), bias), x, weight, bias)
    assert_close(reference(x[:1], weight.t().contiguous().t(), bias), x[:1], weight, bias)
    assert torch.equal(wide[:, 5 : 5 + LARGE[1]], before)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_row_does_not_depend_on_the_others(rows):
    x, weight, bias = make_inputs(rows)
    found = reference(x, weight, bias)
    x[1:] = torch.nan
    assert torch.equal(reference(x, weight, bias)[:1], found[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, 4])
def test_other_dtypes_run_in_torch(rows, dtype):
    inputs = make_inputs(rows, dtype=dtype)
    assert torch.equal(reference(*inputs), F.linear(*inputs))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("rows", [1, 4])
def test_autocast_sets_the_dtype(rows, compiled):
    layer = Linear(LARGE[1], LARGE[0])
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    x, _, _ = make_inputs(rows)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = run(x), F.linear(x, layer.weight, layer.bias)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


class Scaled(torch.Tensor):
    """A weight with its own F.linear, like sharded and quantized weights."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        plain = [x.as_subclass(torch.Tensor) if isinstance(x, Scaled) else x for x in arguments]
        result = function(*plain, **(options or {}))
        return 2 * result if function is F.linear else result


@pytest.mark.parametrize("rows", [1, 4])
def test_tensor_subclasses_keep_their_own_linear(rows):
    x, weight, bias = make_inputs(rows)
    torch.testing.assert_close(linear(x, weight.as_subclass(Scaled), bias), 2 * F.linear(x, weight, bias))


def test_without_onednn_torch_computes_the_matmul(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert torch.equal(reference(*make_inputs(4)), F.linear(*make_inputs(4)))


@pytest.mark.parametrize("rows", [1, 4])
def test_gradients_equal_those_of_torch(rows):
    found, expected = [], []
    for function, grads in ((linear, found), (F.linear, expected)):
        inputs = [x.requires_grad_() for x in make_inputs(rows)]
        function(*inputs).square().sum().backward()
        grads += [x.grad for x in inputs]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("rows", [1, 4])
def test_opcheck(rows):
    x, weight, bias = make_inputs(rows)
    for arguments in ((x, weight, bias), (x, weight, None)):
        opcheck(torch.ops.keye_kernels.linear.default, arguments)


def test_a_layer_compiles_as_one_graph_for_any_number_of_rows():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    layer = Linear(LARGE[1], LARGE[0]).requires_grad_(False)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(lambda x: F.relu(layer(x)), fullgraph=True, dynamic=True, backend=counter)
    for rows in (4, 7, 300):
        x, _, _ = make_inputs(rows)
        torch.testing.assert_close(compiled(x), F.relu(F.linear(x, layer.weight, layer.bias)), atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1


def test_every_matmul_of_the_model_uses_this_operator(monkeypatch):
    model, used = tiny_model(), set()

    def record(x, weight, bias=None):
        used.add(weight.data_ptr())
        return F.linear(x, weight, bias)

    for module, name in (("ops.linear", "reference_linear"), ("reference.patch_merge", "linear")):
        monkeypatch.setattr(sys.modules[f"keye_kernels.{module}"], name, record)
    with torch.no_grad():
        model(**prompt([(1, 4, 6)]))
    tables = (model.visual.position_embedding.weight, model.model.embed_tokens.weight)
    matrices = {p.data_ptr() for p in model.parameters() if p.ndim == 2} - {table.data_ptr() for table in tables}
    assert matrices <= used
