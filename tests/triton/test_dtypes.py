"""dtypes in the interpreter, which multiplies the raw bits of bf16: operators compute in float32 there. float64 is refused."""

import pytest
import torch

import keye_kernels as kk
from keye_kernels.segments import Segments
from keye_kernels.small import ASSETS, small_model, small_processor
from keye_kernels.tools.demo import ask
from tests.helpers.operator_calls import CASES, IDS, needs_gradient


def converted(arguments, keywords, dtype):
    """Float64 tensors as `dtype`. Norm weights are float32 in the cases and are converted as well."""
    arguments = [x.to(dtype) if needs_gradient(x) else x for x in arguments]
    return arguments, {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


@pytest.mark.parametrize(("name", "op", "arguments", "keywords"), CASES, ids=IDS)
def test_bf16_operators_round_the_float32_result_once(name, op, arguments, keywords):
    arguments, keywords = converted(arguments, keywords, torch.bfloat16)
    found = as_tuple(op(*arguments, **keywords, impl="triton"))
    wide = [x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x for x in arguments]
    wide_keywords = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
    expected = as_tuple(op(*wide, **wide_keywords, impl="triton"))
    assert [x.dtype for x in found] == [x.dtype for x in as_tuple(op(*arguments, **keywords, impl="reference"))]
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y.to(x.dtype))


@pytest.mark.parametrize(("name", "op", "arguments", "keywords"), CASES, ids=IDS)
def test_gradients_of_the_kernels_are_those_of_the_reference(name, op, arguments, keywords):
    arguments, keywords = converted(arguments, keywords, torch.float32)
    found = []
    for impl in ("triton", "reference"):
        leaves = [
            x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x for x in arguments
        ]
        if "rope" in name:  # no gradients for frequencies
            leaves[3] = arguments[3]
        # The gradient of a sum is expanded: no stride of it is 1
        sum(x.sum() for x in as_tuple(op(*leaves, **keywords, impl=impl))).backward()
        found.append([x.grad for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad])
    assert found[0] and all(x.is_contiguous() for x in found[0])
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_bf16_attention_with_segments_and_matmuls_of_torch():
    q, k, v = torch.randn(3, 9, 2, 16, dtype=torch.bfloat16).unbind(0)
    segments = Segments.from_lengths([4, 5], q.device)
    found = kk.ops.varlen_attention(q, k, v, segments, 5, impl="triton")
    torch.testing.assert_close(found, kk.ops.varlen_attention(q, k, v, segments, 5, impl="reference"), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(("name", "op", "arguments", "keywords"), CASES, ids=IDS)
def test_float64_is_refused_by_the_kernels(name, op, arguments, keywords):
    with pytest.raises(TypeError, match=r"takes float32, float16 or bfloat16 tensors, got torch\.float64; use impl='reference'"):
        op(*arguments, **keywords, impl="triton")


def test_the_small_model_answers_in_bf16():
    model, processor = small_model(dtype="bfloat16", device="cpu", impl="triton"), small_processor()
    reference = small_model(dtype="bfloat16", device="cpu", impl="reference")
    image = next(iter(ASSETS.glob("*.png")))
    assert (
        ask(model, processor, image, "what is in the picture?")[0]
        == ask(reference, processor, image, "what is in the picture?")[0]
    )
