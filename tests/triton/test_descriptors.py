"""Blocks fetched through tensor descriptors, in the interpreter: the same bits as through pointers, in every product."""

import pytest
import torch

from keye_kernels.triton import descriptors, matmul, patch_merge, varlen_attention

CONFIG = {"num_warps": 4, "num_stages": 2, "path": "triton"}
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])


@pytest.fixture
def both(monkeypatch):
    """Runs a launch with pointers and with descriptors: the results of both, and the blocks that were described."""
    tensor_descriptor = pytest.importorskip("triton.tools.tensor_descriptor").TensorDescriptor
    make, made = tensor_descriptor.from_tensor, []
    monkeypatch.setattr(
        tensor_descriptor, "from_tensor", staticmethod(lambda x, block: made.append(block) or make(x, block))
    )

    def run(launch, **config):
        results = [launch({**CONFIG, **config, "loads": loads}) for loads in ("pointers", "descriptors")]
        return *results, list(made)

    return run


def normal(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def segments(dtype, head_dim=72, lengths=(133, 0, 12, 70)):
    q, k, v = (normal(sum(lengths), heads, head_dim, dtype=dtype, seed=heads) for heads in (4, 2, 2))
    return q, k, v, torch.tensor([0, *lengths]).cumsum(0).int()


def attend(q, k, v, cu_seqlens, causal):
    def launch(config):
        scale = q.shape[2] ** -0.5
        return varlen_attention.varlen_attention(q, k, v, cu_seqlens, 133, scale, causal, True, config)

    return launch


def same_bits(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@DTYPES
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [8, 64, 72, 96, 128], ids=lambda head_dim: f"D{head_dim}")
def test_attention_gives_the_same_bits(both, head_dim, causal, dtype, poisoned_empty):
    pointers, fetched, blocks = both(attend(*segments(dtype, head_dim), causal), BLOCK_M=64, BLOCK_N=32)
    assert same_bits(pointers, fetched)
    tail = {72: 8, 96: 32}.get(head_dim)
    widths = [16] * 2 if head_dim == 8 else [64, max(tail, 16), 64, tail] if tail else [head_dim] * 2
    assert blocks == [[32, 1, width] for width in widths]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the NaN
def test_neighbours_of_a_segment_are_not_seen(both):
    q, k, v, cu_seqlens = segments(torch.float16)
    before, _, _ = both(attend(q, k, v, cu_seqlens, False), BLOCK_M=64, BLOCK_N=32)
    for x in (k, v):
        x[133:145] = torch.nan
    _, fetched, _ = both(attend(q, k, v, cu_seqlens, False), BLOCK_M=64, BLOCK_N=32)
    rest = [*range(133), *range(145, 215)]
    assert torch.equal(before[0][rest], fetched[0][rest]) and fetched[0][133:145].isnan().all()


def test_views_of_a_fused_projection_are_described(both):
    q, k, v, cu_seqlens = segments(torch.float16)
    views = torch.cat((q, k, v), dim=1).split((4, 2, 2), dim=1)
    contiguous, _, _ = both(attend(q, k, v, cu_seqlens, False), BLOCK_M=64, BLOCK_N=32)
    pointers, fetched, blocks = both(attend(*views, cu_seqlens, False), BLOCK_M=64, BLOCK_N=32)
    assert same_bits(pointers, fetched) and same_bits(contiguous, fetched) and len(blocks) == 8


@pytest.mark.parametrize("offset", [0, 1], ids=["stride", "start"])
def test_what_the_engine_cannot_address_goes_by_pointers(both, offset):
    q, k, v, cu_seqlens = segments(torch.float16)
    wide = torch.zeros(*k.shape[:2], 76 + 4 * offset, dtype=k.dtype)  # 152 bytes, or 160 from the second on
    odd = wide[..., offset : offset + 72].copy_(k)
    pointers, fetched, blocks = both(attend(q, odd, v, cu_seqlens, False), BLOCK_M=64, BLOCK_N=32)
    assert same_bits(pointers, fetched) and blocks == []


@DTYPES
@pytest.mark.parametrize("gelu", [False, True], ids=["plain", "gelu"])
@pytest.mark.parametrize("rows", [1, 70])
def test_linear_gives_the_same_bits(both, rows, gelu, dtype, poisoned_empty):
    x, weight, bias = normal(rows, 144, dtype=dtype), normal(100, 144, dtype=dtype, seed=1), normal(100, dtype=dtype)
    sizes = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}  # cut to 16, which divides 144
    pointers, fetched, blocks = both(lambda config: matmul.linear(x, weight, bias, config, gelu), **sizes)
    assert torch.equal(pointers, fetched) and blocks == [[64, 16], [64, 16]]


@pytest.mark.parametrize(
    ("path", "statistics", "described"),
    [("triton", "fused", 1), ("triton", "separate", 1), ("merged", "separate", 2)],
    ids=["fused", "separate", "merged"],
)
def test_the_projector_gives_the_same_bits(both, path, statistics, described, poisoned_empty):
    features = normal(76, 64, dtype=torch.float16)
    shapes = [(64,), (64,), (128, 256), (128,), (96, 128), (96,)]
    weights = [normal(*shape, dtype=torch.float16, seed=seed) * 0.1 for seed, shape in enumerate(shapes)]

    def launch(config):
        return patch_merge.patch_merge_projection(features, None, *weights, config=config)

    sizes = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "path": path, "statistics": statistics}
    pointers, fetched, blocks = both(launch, **sizes, tiles_per_program=1)
    assert torch.equal(pointers, fetched) and blocks == [[64, 64]] * described


def test_only_hopper_and_later_have_them():
    found = {arch: "descriptors" in descriptors.loads_of(arch) for arch in (80, 89, 90, 100, 120, "gfx942")}
    assert [arch for arch, has in found.items() if has] == [90, 100, 120]


def test_a_descriptor_can_be_compiled_for_chips_that_are_not_here():
    config = CONFIG | {"BLOCK_N": 64, "loads": "descriptors"}
    blocks = varlen_attention.key_blocks(64, {"MAIN": 64, "QK_TAIL": 16, "PV_TAIL": 0})
    assert descriptors.describe_types(config, "bf16", *blocks) == [
        "tensordesc<bf16[64,1,64]>", "tensordesc<bf16[64,1,16]>", "tensordesc<bf16[64,1,64]>", None,
    ]  # fmt: skip
