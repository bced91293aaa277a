"""`linear_few_rows`: implementations, torch.compile, and wrong arguments."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from keye_kernels import ops

module = import_module("keye_kernels.ops.linear_few_rows")  # the package has the function under this name
IMPLEMENTATIONS = ["reference", "triton", "torch"]


def arguments(dtype=torch.float32, silu_mul=False):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (3, 24), "weight": (10, 24), "bias": (10,), "residual": (3, 5 if silu_mul else 10)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()} | {"silu_mul": silu_mul}


def run(function=ops.linear_few_rows, /, **changes):
    return function(**{**arguments(), "impl": "reference", **changes})


@pytest.mark.parametrize("silu_mul", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_it_is_a_linear_layer_with_an_epilogue(impl, dtype, silu_mul):
    given = arguments(dtype, silu_mul)
    x, weight, bias, residual = (given[name].double() for name in ("x", "weight", "bias", "residual"))
    expected = F.linear(x, weight, bias)
    if silu_mul:
        expected = F.silu(expected[:, :5]) * expected[:, 5:]
    found = run(impl=impl, **given)
    roundings = 4 if impl == "torch" else 2  # the interpreter truncates bfloat16
    tolerance = roundings * torch.finfo(dtype).eps * expected.abs().max()
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected + residual, rtol=0, atol=max(tolerance.item(), 1e-5))


@pytest.mark.parametrize("silu_mul", [False, True])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_opcheck(impl, silu_mul):
    opcheck(module._linear_op, (*arguments(silu_mul=silu_mul).values(), impl))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compiled_calls(impl):
    compiled = torch.compile(ops.linear_few_rows, fullgraph=True, backend="aot_eager")
    for silu_mul in (False, True):
        given = arguments(silu_mul=silu_mul)
        assert torch.equal(run(compiled, impl=impl, **given), run(impl=impl, **given))


def test_float64_needs_the_reference():
    given = arguments(torch.float64)
    assert run(**given).dtype == torch.float64
    for impl in ("triton", "torch"):
        with pytest.raises(TypeError, match=f"impl='{impl}' of linear_few_rows takes float32"):
            run(impl=impl, **given)


def test_no_host_values_are_read():
    """Meta tensors have none."""
    meta = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in arguments().items()}
    assert ops.linear_few_rows(**meta, impl="reference").shape == (3, 10)


def test_a_named_implementation_is_not_replaced(monkeypatch):
    from keye_kernels.triton import linear_few_rows as kernel

    backends = []
    launch = kernel.linear_few_rows
    monkeypatch.setattr(kernel, "linear_few_rows", lambda *given: backends.append(given[-1]) or launch(*given))
    for impl in ("triton", "torch"):
        run(impl=impl)
        with ops.use_impl(impl):
            run(impl="auto")
    assert backends == ["triton", "triton", "torch", "torch"]
    monkeypatch.setattr(module, "resolve", lambda *_: "triton")  # as "auto" on a GPU
    run(impl="auto")
    assert backends[-1] == "auto"


WRONG = [
    ("x", torch.zeros(17, 24), ValueError, r"x must have at most 16 rows and at least one column, got shape \[17, 24\]"),
    ("x", torch.zeros(3, 0), ValueError, r"x must have at most 16 rows and at least one column, got shape \[3, 0\]"),
    ("x", torch.zeros(24), ValueError, "x must have shape"),
    ("x", torch.zeros(3, 48)[:, ::2], ValueError, "x must be contiguous along its last axis"),
    ("x", torch.zeros(3, 24).int(), TypeError, "x must be float32"),
    ("weight", torch.zeros(10, 23), ValueError, r"weight must have shape \[out, 24\]"),
    ("weight", torch.zeros(10, 24).half(), TypeError, "weight must be float32"),
    ("weight", [0.0], TypeError, "weight must be a tensor"),
    ("bias", torch.zeros(9), ValueError, r"bias must have shape \[10\]"),
    ("bias", torch.zeros(10).half(), TypeError, "bias must be float32"),
    ("residual", torch.zeros(3, 9), ValueError, r"residual must have shape \[3, 10\]"),
    ("residual", torch.zeros(3, 10).half(), TypeError, "residual must be float32"),
    ("silu_mul", True, ValueError, r"residual must have shape \[3, 5\]"),
    ("silu_mul", 1, TypeError, "silu_mul must be a bool, got 1"),
    ("impl", "flash_attn", ValueError, "impl must be one of 'auto', 'reference', 'triton', 'torch'"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_wrong_arguments_raise(name, value, error, message):
    with pytest.raises(error, match=message):
        run(**{name: value})


def test_a_gate_needs_as_many_rows_as_up():
    with pytest.raises(ValueError, match=r"weight must have an even number of rows with silu_mul, got shape \[9, 24\]"):
        run(weight=torch.zeros(9, 24), bias=None, residual=None, silu_mul=True)
