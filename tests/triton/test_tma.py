"""Tensor descriptors in the interpreter: kernels compute the same bits with descriptors as with pointers."""

import pytest
import torch

from keye_kernels.segments import tile_schedule
from keye_kernels.triton.device import MULTIPROCESSORS, Arch
from keye_kernels.triton.linear import linear
from keye_kernels.triton.tma import descriptor_types, make_descriptors
from keye_kernels.triton.varlen_attention import key_blocks, varlen_attention

CONFIG = {"num_warps": 4, "num_stages": 2, "backend": "triton"}
ATTENTION_BLOCKS = {"BLOCK_M": 64, "BLOCK_N": 32}
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])


@pytest.fixture
def run_both(monkeypatch):
    """A function that launches with pointers, then with descriptors. It also returns the block shapes of all descriptors."""
    descriptor = pytest.importorskip("triton.tools.tensor_descriptor").TensorDescriptor
    from_tensor, shapes = descriptor.from_tensor, []
    monkeypatch.setattr(descriptor, "from_tensor", staticmethod(lambda x, shape: shapes.append(shape) or from_tensor(x, shape)))

    def run(launch, **blocks):
        results = [launch(CONFIG | blocks | {"use_tma": use_tma}) for use_tma in (False, True)]
        return *results, list(shapes)

    return run


def normal(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed(dtype, head_dim=72, lengths=(133, 0, 12, 70)):
    q, k, v = (normal(sum(lengths), heads, head_dim, dtype=dtype, seed=heads) for heads in (4, 2, 2))
    return q, k, v, torch.tensor([0, *lengths]).cumsum(0).int()


def attend(q, k, v, cu_seqlens, causal=False, scheduled=True):
    def launch(config):
        schedule = tile_schedule(cu_seqlens, config["BLOCK_M"], causal) if scheduled else None
        arguments = q, k, v, cu_seqlens, 133, q.shape[2] ** -0.5, causal, True
        return varlen_attention(*arguments, schedule, config=config)

    return launch


def same_bits(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@DTYPES
@pytest.mark.parametrize(("causal", "scheduled"), [(False, True), (True, False)], ids=["full", "causal-searched"])
@pytest.mark.parametrize("head_dim", [8, 64, 72, 96, 128], ids=lambda head_dim: f"D{head_dim}")
def test_attention_computes_the_same_bits(run_both, head_dim, causal, scheduled, dtype, poisoned_empty):
    launch = attend(*packed(dtype, head_dim), causal, scheduled)
    pointers, descriptors, shapes = run_both(launch, **ATTENTION_BLOCKS)
    assert same_bits(pointers, descriptors)
    tail = {72: 8, 96: 32}.get(head_dim)
    widths = [16] * 2 if head_dim == 8 else [64, max(tail, 16), 64, tail] if tail else [head_dim] * 2
    assert shapes == [[32, 1, width] for width in widths]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns about the NaN
def test_a_segment_does_not_read_its_neighbors(run_both):
    q, k, v, cu_seqlens = packed(torch.float16)
    before, _, _ = run_both(attend(q, k, v, cu_seqlens), **ATTENTION_BLOCKS)
    for x in (k, v):
        x[133:145] = torch.nan
    _, descriptors, _ = run_both(attend(q, k, v, cu_seqlens), **ATTENTION_BLOCKS)
    rest = [*range(133), *range(145, 215)]
    assert torch.equal(before[0][rest], descriptors[0][rest]) and descriptors[0][133:145].isnan().all()


def test_descriptors_are_used_for_views_of_a_fused_projection(run_both):
    q, k, v, cu_seqlens = packed(torch.float16)
    views = torch.cat((q, k, v), dim=1).split((4, 2, 2), dim=1)
    contiguous, _, _ = run_both(attend(q, k, v, cu_seqlens), **ATTENTION_BLOCKS)
    pointers, descriptors, shapes = run_both(attend(*views, cu_seqlens), **ATTENTION_BLOCKS)
    assert same_bits(pointers, descriptors) and same_bits(contiguous, descriptors) and len(shapes) == 8


@pytest.mark.parametrize("offset", [0, 1], ids=["stride", "address"])
def test_unaligned_tensors_are_read_through_pointers(run_both, offset):
    q, k, v, cu_seqlens = packed(torch.float16)
    # Rows of 152 bytes, or aligned rows of 160 bytes that start 2 bytes later
    wide = torch.zeros(*k.shape[:2], 76 + 4 * offset, dtype=k.dtype)
    unaligned = wide[..., offset : offset + 72].copy_(k)
    pointers, with_tma, shapes = run_both(attend(q, unaligned, v, cu_seqlens), **ATTENTION_BLOCKS)
    assert same_bits(pointers, with_tma) and shapes == []


@DTYPES
@pytest.mark.parametrize("gelu", [False, True], ids=["plain", "gelu"])
@pytest.mark.parametrize("rows", [1, 70])
def test_linear_computes_the_same_bits(run_both, rows, gelu, dtype, poisoned_empty):
    x, weight, bias = normal(rows, 144, dtype=dtype), normal(100, 144, dtype=dtype, seed=1), normal(100, dtype=dtype)
    blocks = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}  # BLOCK_K becomes 16, which divides 144
    pointers, descriptors, shapes = run_both(lambda config: linear(x, weight, bias, gelu, config=config), **blocks)
    assert torch.equal(pointers, descriptors) and shapes == [[64, 16], [64, 16]]


def test_descriptors_fill_columns_past_an_odd_multiple_of_8_with_zeros(run_both):
    x, weight, bias = (normal(*shape, dtype=torch.float16) for shape in ((70, 72), (40, 72), (40,)))
    blocks = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}
    pointers, descriptors, shapes = run_both(lambda config: linear(x, weight, bias, config=config), **blocks)
    assert torch.equal(pointers, descriptors) and shapes == [[64, 32], [64, 32]]


def test_only_hopper_and_later_have_tma():
    assert [name for name in MULTIPROCESSORS if Arch(name).has_tma] == ["sm_90", "sm_100", "sm_120"]


def test_argument_types_of_descriptors():
    blocks = key_blocks(64, {"MAIN": 64, "QK_TAIL": 16, "PV_TAIL": 0})
    assert descriptor_types(CONFIG | {"use_tma": True}, "bf16", *blocks) == [
        "tensordesc<bf16[64,1,64]>", "tensordesc<bf16[64,1,16]>", "tensordesc<bf16[64,1,64]>", None,
    ]  # fmt: skip
    assert descriptor_types(CONFIG | {"use_tma": False}, "bf16", *blocks) == [None] * 4


def test_a_launch_has_descriptors_only_if_every_tensor_is_aligned():
    """To 16 bytes: the address and every stride but the last, which is one element."""
    aligned = torch.zeros(4, 2, 80, dtype=torch.float16)[..., :72]
    flat = torch.zeros(4 * 2 * 160, dtype=torch.float16)
    unaligned = {
        "address": torch.zeros(4, 2, 80, dtype=torch.float16)[..., 4:76],
        "token stride": flat.as_strided((4, 2, 72), (148, 72, 1)),
        "head stride": flat.as_strided((4, 2, 72), (160, 76, 1)),
        "last stride": flat.as_strided((4, 2, 72), (160, 80, 2)),
    }
    config, block = CONFIG | {"use_tma": True}, [2, 1, 64]
    for x in (aligned, aligned.float(), torch.zeros(4, 8)[:, :4]):
        shape = block if x.ndim == 3 else [2, 4]
        first, none, second = make_descriptors(config, (aligned, block), (x, None), (x, shape))
        assert none is None and second.base is x and second.block_shape == shape and first.base is aligned
        assert (*second.shape,) == x.shape and (*second.strides,) == x.stride()
    for name, x in unaligned.items():
        for blocks in ([(x, block), (aligned, block)], [(aligned, block), (x, block)], [(aligned, block), (x, None)]):
            assert make_descriptors(config, *blocks) == [None, None], name
    assert make_descriptors(CONFIG | {"use_tma": False}, (aligned, block)) == [None]


def test_argument_types_follow_the_dtype():
    config = CONFIG | {"use_tma": True}
    for dtype in ("bf16", "fp16", "fp32"):
        assert descriptor_types(config, dtype, [64, 32], None) == [f"tensordesc<{dtype}[64,32]>", None]
