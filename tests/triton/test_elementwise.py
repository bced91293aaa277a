"""The kernels add_norm and silu_mul in the interpreter: against float64, exact properties, and memory traffic."""

import pytest
import torch

from keye_kernels import reference
from keye_kernels.tools.bench.traffic import count_traffic, tensor_bytes
from keye_kernels.triton.add_norm import add_norm
from keye_kernels.triton.silu_mul import silu_mul

EPS = 1e-6
FP32 = {"atol": 2e-6, "rtol": 2e-6}
CONFIGS = {"add_norm": {"BLOCK_T": 4, "num_warps": 4}, "silu_mul": {"BLOCK_T": 4, "BLOCK_C": 64, "num_warps": 4}}


def norm_inputs(rows=5, channels=144, dtype=torch.float32, bias=True, residual=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, other = 3 + torch.randn(rows, channels, generator=generator), torch.randn(rows, channels, generator=generator)
    weight, shift = 1 + 0.5 * torch.randn(channels, generator=generator), torch.randn(channels, generator=generator)
    return x.to(dtype), other.to(dtype) if residual else None, weight.to(dtype), shift.to(dtype) if bias else None


def exact_norm(x, residual, weight, bias):
    """In float64, of the sum as it is rounded."""
    total = x if residual is None else x + residual
    wide = total.double()
    centered = wide if bias is None else wide - wide.mean(1, keepdim=True)
    normed = centered / (centered.square().mean(1, keepdim=True) + EPS).sqrt() * weight.double()
    return total, normed if bias is None else normed + bias.double()


KINDS = pytest.mark.parametrize(
    ("bias", "residual"), [(True, True), (True, False), (False, True), (False, False)],
    ids=["LayerNorm of sum", "LayerNorm", "RMSNorm of sum", "RMSNorm"],
)  # fmt: skip


@KINDS
@pytest.mark.parametrize("channels", [8, 100, 128, 1152])
def test_norm_in_fp32_matches_float64(channels, bias, residual, poisoned_empty):
    inputs = norm_inputs(5, channels, bias=bias, residual=residual)
    total, normed = add_norm(*inputs, EPS)
    expected_total, expected = exact_norm(*inputs)
    assert torch.equal(total, expected_total) and (total is inputs[0]) == (not residual)
    torch.testing.assert_close(normed.double(), expected, **FP32)


@KINDS
def test_norm_in_fp16_is_that_of_the_rounded_sum_rounded_once(bias, residual, poisoned_empty):
    inputs = norm_inputs(7, 100, torch.float16, bias, residual)
    total, normed = add_norm(*inputs, EPS)
    expected_total, expected = exact_norm(*inputs)
    assert torch.equal(total, expected_total)
    # Float32 sums may carry a value over the middle between two float16 numbers
    ulp = torch.finfo(torch.float16).eps * torch.exp2(expected.abs().clamp(min=2**-14).log2().floor())
    assert ((normed.double() - expected).abs() <= 0.502 * ulp + 1e-5).all()


def test_the_norm_of_a_rounded_sum_differs_from_that_of_the_exact_sum():
    """A sum that loses its low bits: 2048 + 0.75 is 2048 in float16."""
    x, residual = torch.full((1, 16), 0.75).half(), torch.full((1, 16), 2048.0).half()
    x[0, ::2] = 0
    total, normed = add_norm(x, residual, torch.ones(16).half(), torch.zeros(16).half(), EPS)
    assert torch.equal(total, residual) and torch.equal(normed, torch.zeros(1, 16).half())


def test_bf16_is_within_one_ulp(poisoned_empty):
    x, residual, weight, bias = norm_inputs(3, 64, torch.bfloat16)
    total, normed = add_norm(x, residual, weight, bias, EPS)
    sums, (_, expected) = x.double() + residual.double(), exact_norm(total, None, weight, bias)
    ulp = torch.finfo(torch.bfloat16).eps  # the interpreter truncates
    assert ((total.double() - sums).abs() <= ulp * sums.abs()).all()
    assert ((normed.double() - expected).abs() <= ulp * expected.abs() + 1e-5).all()


def test_float32_weights_with_fp16_rows():
    x, residual, _, _ = norm_inputs(3, 64, torch.float16)
    _, _, weight, bias = norm_inputs(3, 64)
    expected = exact_norm(x, residual, weight, bias)[1].half()
    torch.testing.assert_close(add_norm(x, residual, weight, bias, EPS)[1], expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("width", [144, 145, 152], ids=["contiguous", "odd", "wide"])
def test_strides_of_rows_change_no_bit(width):
    inputs = norm_inputs()
    expected = add_norm(*inputs, EPS)
    x, residual = (torch.full((5, width), torch.nan) for _ in range(2))
    x[:, :144], residual[:, :144] = inputs[:2]
    for pair in ((x[:, :144], inputs[1]), (inputs[0], residual[:, :144]), (x[:, :144], residual[:, :144])):
        assert all(map(torch.equal, add_norm(*pair, *inputs[2:], EPS), expected))


def test_strided_weights_change_no_bit():
    inputs = norm_inputs()
    strided = [torch.stack((weight, torch.full_like(weight, torch.nan)), 1)[:, 0] for weight in inputs[2:]]
    assert all(map(torch.equal, add_norm(*inputs[:2], *strided, EPS), add_norm(*inputs, EPS)))


def test_launch_configs_and_other_rows_change_no_bit():
    inputs = norm_inputs(6)
    expected = add_norm(*inputs, EPS)
    assert all(map(torch.equal, add_norm(*inputs, EPS, CONFIGS["add_norm"]), expected))
    changed = inputs[0].clone()
    changed[2] = torch.nan
    kept = torch.arange(6) != 2
    for found, old in zip(add_norm(changed, *inputs[1:], EPS), expected, strict=True):
        assert torch.equal(found[kept], old[kept]) and found[2].isnan().all()


def test_nothing_is_written_after_the_last_row(monkeypatch):
    """Outputs are views of the first rows of larger tensors here."""
    made, empty = [], torch.empty

    def larger(shape, **options):
        made.append(torch.full((shape[0] + 3, *shape[1:]), 7.0, dtype=options["dtype"]))
        return made[-1][: shape[0]]

    monkeypatch.setattr(torch, "empty", larger)
    add_norm(*norm_inputs(5), EPS, CONFIGS["add_norm"])
    silu_mul(*norm_inputs(5)[:2], CONFIGS["silu_mul"])
    monkeypatch.setattr(torch, "empty", empty)
    assert len(made) == 3 and all((x[5:] == 7).all() for x in made)


def test_eps_and_large_means():
    x = torch.full((2, 32), 1000.0) + torch.arange(32) * 1e-2
    weight, bias = torch.ones(32), torch.zeros(32)
    torch.testing.assert_close(add_norm(x, None, weight, bias, 0.1)[1], torch.nn.functional.layer_norm(x, (32,), eps=0.1))
    assert torch.equal(add_norm(torch.zeros(1, 16), None, torch.ones(16), None, EPS)[1], torch.zeros(1, 16))


def gate_up(rows=5, channels=144, dtype=torch.float32):
    wide = 3 * torch.randn(rows, 2 * channels, generator=torch.Generator().manual_seed(rows))
    return wide.to(dtype).split(channels, dim=1)


@pytest.mark.parametrize("channels", [1, 8, 100, 1500])
def test_silu_mul_matches_float64(channels, poisoned_empty):
    gate, up = gate_up(channels=channels)
    exact = gate.double().sigmoid() * gate.double() * up.double()
    torch.testing.assert_close(silu_mul(gate, up).double(), exact, atol=1e-6, rtol=1e-5)


def test_silu_mul_in_fp16_is_rounded_once(poisoned_empty):
    gate, up = gate_up(dtype=torch.float16)
    exact = (gate.float().sigmoid() * gate.float() * up.float()).half()
    torch.testing.assert_close(silu_mul(gate, up), exact, atol=0, rtol=torch.finfo(torch.float16).eps)


@pytest.mark.parametrize(("gate_width", "up_width"), [(144, 145), (145, 144), (152, 160)])
def test_any_strides_of_gate_and_up(gate_width, up_width):
    gate, up = (x.contiguous() for x in gate_up())
    strided = [torch.full((5, width), torch.nan) for width in (gate_width, up_width)]
    for wide, x in zip(strided, (gate, up), strict=True):
        wide[:, :144] = x
    expected = silu_mul(gate, up)
    assert torch.equal(silu_mul(*(x[:, :144] for x in strided)), expected)
    assert torch.equal(silu_mul(gate, up, CONFIGS["silu_mul"]), expected)


def test_silu_mul_of_large_gates_and_of_nan():
    gate = torch.tensor([[-200.0, -90.0, 90.0, 200.0, torch.nan, 1.0, -torch.inf, torch.inf]])
    found = silu_mul(gate, torch.full_like(gate, 2.0))
    assert found[0, :2].abs().max() < 1e-30 and found[0, 2:4].tolist() == [180.0, 400.0]
    assert found[0, 4].isnan() and found[0, 7] == torch.inf


def test_no_rows():
    assert [x.shape for x in add_norm(*norm_inputs(0), EPS)] == [(0, 144)] * 2
    assert silu_mul(*gate_up(0)).shape == (0, 144)


def test_memory_traffic_is_the_floor():
    inputs = norm_inputs(64, 1152, torch.float16)
    with count_traffic() as traffic:
        outputs = add_norm(*inputs, EPS)
    assert len(traffic.launches) == 1 and traffic.idle_programs == 0 and not traffic.eager_operators
    assert traffic.unique == tensor_bytes(*inputs, *outputs)
    gate, up = gate_up(64, 1152, torch.float16)
    with count_traffic() as traffic:
        out = silu_mul(gate, up)
    assert traffic.requested == traffic.unique == tensor_bytes(gate, up, out) and not traffic.eager_operators


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_reference_is_the_definition(dtype):
    inputs = norm_inputs(dtype=dtype)
    for given in (inputs, (*inputs[:3], None), (inputs[0], None, *inputs[2:])):
        (total, normed), (expected_total, expected) = reference.add_norm(*given, EPS), exact_norm(*given)
        assert torch.equal(total, expected_total) and normed.dtype == dtype
        torch.testing.assert_close(normed.double(), expected, atol=2e-3 if dtype == torch.float16 else 2e-6, rtol=1e-3)
