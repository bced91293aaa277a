"""The eager implementations on a CPU run in chunks of tokens: same bits, and temporary tensors of a few chunks."""

import pytest
import torch

import keye_kernels as kk
from keye_kernels import reference
from keye_kernels.geometry import VisionBatch
from keye_kernels.ops import cpu
from keye_kernels.tools.timing.measuring import with_peak_memory

GRID = (1, 26, 38)
TOKENS = 988  # of GRID: not a multiple of a chunk
SECTIONS = [16, 24, 24]
MAX_CHUNKS = 6  # of temporary tensors at one time


def rope_3d(dtype, tokens=TOKENS):
    q, k = torch.randn(tokens, 24, 128).to(dtype).split([16, 8], dim=1)
    weights = torch.randn(2, 128).to(dtype)
    options = torch.randint(0, 5000, (3, tokens)), torch.rand(64)
    ours = kk.ops.rope_3d(q, k, *options, SECTIONS, q_norm_weight=weights[0], k_norm_weight=weights[1])
    return ours, reference.rope(q, k, *options, SECTIONS, *weights)


def rope_2d(dtype, tokens=TOKENS):
    q, k, _ = torch.randn(tokens, 3, 16, 72).to(dtype).unbind(1)
    options = torch.randint(0, 80, (2, tokens)), torch.rand(18)
    return kk.ops.rope_2d(q, k, *options), reference.rope(q, k, *options, [18, 18])


def position_embedding_2d(dtype):
    features, table = torch.randn(TOKENS, 1152).to(dtype), torch.randn(27 * 27, 1152).to(dtype)
    batch = VisionBatch.build(torch.tensor([GRID]), TOKENS, table_side=27)
    expected = reference.position_embedding_2d(features, table, batch.corner_index, batch.corner_weight)
    return (kk.ops.position_embedding_2d(features, table, batch),), (expected,)


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(cpu, "BYTES_PER_CHUNK_AND_THREAD", 1 << 18)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("run", [rope_3d, rope_2d, position_embedding_2d], ids=lambda run: run.__name__)
def test_chunks_give_the_bits_of_the_whole_tensor(run, dtype):
    torch.manual_seed(0)
    for found, expected in zip(*run(dtype), strict=True):
        assert torch.equal(found, expected) and found.dtype == dtype and found.is_contiguous()


@pytest.mark.parametrize("run", [rope_3d, rope_2d], ids=lambda run: run.__name__)
def test_no_tokens_and_one_token(run):
    for tokens in (0, 1):
        for found, expected in zip(*run(torch.float32, tokens), strict=True):
            assert torch.equal(found, expected)


def test_temporary_tensors_are_a_few_chunks():
    tokens = 4096
    q, k, _ = torch.randn(tokens, 3, 16, 72).bfloat16().unbind(1)
    position_ids, inv_freq = torch.randint(0, 80, (2, tokens)), torch.rand(18)
    outputs, peak = with_peak_memory(lambda: kk.ops.rope_2d(q, k, position_ids, inv_freq), torch.device("cpu"))
    tables = 6 * 4 * tokens * 36
    chunks = MAX_CHUNKS * torch.get_num_threads() << 18
    assert peak < sum(out.nbytes for out in outputs) + tables + chunks


def test_the_tables_are_contiguous():
    """Strided ones made the rotation three times slower."""
    tables = reference.rotation_tables(torch.randint(0, 9, (3, 5)), torch.rand(64), SECTIONS, torch.float32, False)
    assert all(table.is_contiguous() for table in tables)
