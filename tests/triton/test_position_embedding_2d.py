"""The kernel of learned 2D position embeddings in the interpreter: against float64, exact properties, and memory traffic."""

import pytest
import torch
from torch import Tensor

from keye_kernels import reference
from keye_kernels.tools.bench.traffic import count_traffic, tensor_bytes
from keye_kernels.triton.position_embedding_2d import position_embedding_2d

SIDE = 6
FP32 = {"atol": 1e-5, "rtol": 1e-5}


def make(patches: int, dtype: torch.dtype, channels: int = 144, side: int = SIDE) -> tuple[Tensor, ...]:
    """Features, table, and corners of random points of the table's grid with their bilinear weights."""
    torch.manual_seed(patches)
    y, x = (torch.rand(2, patches, dtype=torch.float64) * (side - 1)).unbind()
    top, left = y.floor().clamp(max=side - 2), x.floor().clamp(max=side - 2)
    corner = top * side + left
    down, right = y - top, x - left
    index = torch.stack([corner, corner + 1, corner + side, corner + side + 1], dim=1).int()
    weight = torch.stack([(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right], dim=1).float()
    return torch.randn(patches, channels).to(dtype), torch.randn(side**2, channels).to(dtype), index, weight


def exact(features: Tensor, table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    return reference.position_embedding_2d(features.double(), table.double(), index, weight)


@pytest.mark.parametrize("patches", [1, 63, 100, 257], ids=lambda patches: f"T{patches}")
def test_fp32_matches_float64(patches, poisoned_empty):
    arguments = make(patches, torch.float32)
    torch.testing.assert_close(position_embedding_2d(*arguments).double(), exact(*arguments), **FP32)


def test_fp16_error_is_like_that_of_eager_fp16(poisoned_empty):
    arguments = make(63, torch.float16)
    expected = exact(*arguments)
    eager_error = (reference.position_embedding_2d(*arguments) - expected).abs().max()
    allowed = 2 * (eager_error + torch.finfo(torch.float16).eps * expected.abs().max())
    assert (position_embedding_2d(*arguments) - expected).abs().max() <= allowed


def test_bf16_is_within_one_ulp(poisoned_empty):
    arguments = make(63, torch.bfloat16)
    expected = exact(*arguments)
    ulp = torch.finfo(torch.bfloat16).eps * torch.exp2(expected.abs().clamp(min=1e-30).log2().floor())
    # atol: the error of float32 sums where they cancel
    assert ((position_embedding_2d(*arguments).double() - expected).abs() <= ulp + FP32["atol"]).all()


def test_a_float32_table_is_added_to_fp16_features_without_rounding():
    features, table, index, weight = make(9, torch.float32)
    out = position_embedding_2d(features.half(), table, index, weight)
    expected = exact(features.half(), table, index, weight)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, expected.half(), atol=0, rtol=torch.finfo(torch.float16).eps)


@pytest.mark.parametrize("channels", [8, 100, 128, 1152], ids=lambda channels: f"C{channels}")
def test_any_number_of_channels(channels, poisoned_empty):
    arguments = make(5, torch.float32, channels)
    torch.testing.assert_close(position_embedding_2d(*arguments).double(), exact(*arguments), **FP32)


def test_any_stride_gives_the_same_bits(poisoned_empty):
    features, table, index, weight = make(7, torch.float32)
    expected = position_embedding_2d(features, table, index, weight)
    wider = torch.zeros(7, 145)
    wider[:, :-1] = features
    assert torch.equal(position_embedding_2d(wider[:, :-1], table, index, weight), expected)
    far = features[:1].as_strided((1, 144), (2**31, 1))
    assert torch.equal(position_embedding_2d(far, table, index[:1], weight[:1]), expected[:1])


def test_other_patches_change_no_bit_and_inputs_are_not_modified():
    arguments = make(7, torch.float32)
    before = [x.clone() for x in arguments]
    first = position_embedding_2d(*arguments)
    assert all(torch.equal(x, old) for x, old in zip(arguments, before, strict=True))
    changed = arguments[0].clone()
    changed[3] = torch.nan
    kept = torch.arange(7) != 3
    assert torch.equal(position_embedding_2d(changed, *arguments[1:])[kept], first[kept])


def test_no_patches_give_an_empty_output():
    assert position_embedding_2d(*make(0, torch.float16)).shape == (0, 144)


def test_memory_traffic_is_close_to_the_floor():
    arguments = make(200, torch.float16, channels=1152)
    with count_traffic() as traffic:
        out = position_embedding_2d(*arguments)
    # Only the table rows that a patch uses are read
    unused = arguments[1].shape[0] - arguments[2].unique().numel()
    floor = tensor_bytes(*arguments, out) - unused * tensor_bytes(arguments[1][0])
    assert len(traffic.launches) == 1 and traffic.idle_programs == 0 and not traffic.eager_operators
    assert traffic.unique <= 1.05 * floor
    # Features, indices and weights of each patch are requested once; the four table rows come from the cache
    rows = 4 * tensor_bytes(out)
    assert traffic.requested - rows <= 1.05 * floor
