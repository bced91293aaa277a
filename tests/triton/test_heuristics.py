"""The launch configs without a table, which are measured choices, and the sizes that launchers derive."""

import pytest
import torch

from keye_kernels.triton import linear, position_embedding_2d, rope, varlen_attention
from keye_kernels.triton.device import MULTIPROCESSORS, Arch
from keye_kernels.triton.launch import Kernel
from keye_kernels.triton.launch_config import MAX_BLOCK_SIZES, cdiv, dtype_name, next_power_of_2
from keye_kernels.triton.registry import kernel_spec
from keye_kernels.triton.spec import TuningShape
from keye_kernels.triton.varlen_attention import head_parts, heads_per_l2_group, key_blocks

HALF = (torch.float16, torch.bfloat16)


def attention(arch, head_dim, dtype):
    config = varlen_attention.heuristic(Arch(arch), head_dim, dtype)
    assert (config["use_tma"], config["backend"]) == (False, "triton")
    return tuple(config[name] for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"))


# (BLOCK_M, BLOCK_N, num_warps, num_stages) up to a head dim
MMA_SYNC = {80: (128, 128, 8, 2), 160: (128, 64, 8, 2), 256: (64, 32, 4, 2)}
ATTENTION = {
    "sm_80": MMA_SYNC,
    "sm_86": MMA_SYNC,
    "sm_89": MMA_SYNC,
    "sm_120": MMA_SYNC,
    "sm_90": {80: (128, 64, 4, 3), 128: (64, 64, 4, 3), 256: (128, 64, 8, 2)},
    "sm_100": {128: (128, 128, 8, 2), 160: (128, 64, 8, 2), 256: (128, 32, 8, 2)},
    "gfx942": {128: (128, 64, 4, 2), 256: (64, 32, 4, 2)},
}


@pytest.mark.parametrize("arch", ATTENTION)
def test_attention(arch):
    smallest = 8
    for largest, config in ATTENTION[arch].items():
        for head_dim in range(smallest, largest + 8, 8):
            assert {attention(arch, head_dim, dtype) for dtype in HALF} == {config}, head_dim
        smallest = largest + 8
    assert [attention(arch, head_dim, torch.float32) for head_dim in (8, 80, 88, 256)] == [(32, 32, 8, 2)] * 2 + [
        (16, 16, 8, 2)
    ] * 2


def matmul(arch, rows, columns=4608, dtype=torch.bfloat16, multiprocessors=132):
    config = linear.heuristic(Arch(arch, multiprocessors), rows, columns, dtype)
    assert (config["use_tma"], config["backend"]) == (False, "torch")
    return tuple(config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"))


def test_matmuls():
    for arch in ("sm_90", "sm_100", "sm_103"):
        found = [matmul(arch, rows) for rows in (1, 128, 129, 1792, 1793, 10_000)]
        assert found == [(64, 64, 64, 4, 3)] * 2 + [(64, 128, 64, 4, 3)] * 2 + [(128, 256, 64, 8, 3)] * 2, arch
    for arch in ("sm_80", "sm_86", "sm_89", "sm_120"):
        found = [matmul(arch, rows) for rows in (128, 1792, 1793)]
        assert found == [(64, 64, 32, 4, 4), (64, 128, 32, 4, 4), (128, 256, 32, 8, 4)], arch
    for rows in (1, 10_000):
        assert matmul("gfx942", rows) == (128, 128, 32, 8, 2)
        assert matmul("sm_90", rows, dtype=torch.float32) == matmul("gfx942", rows, dtype=torch.float32) == (64, 256, 32, 8, 2)
    # Two waves of full tiles, or three quarters of a wave of smaller ones, are enough
    assert [matmul("sm_90", 1920, multiprocessors=count)[:2] for count in (135, 136)] == [(128, 256), (64, 128)]
    assert [matmul("sm_90", 64, multiprocessors=count)[:2] for count in (48, 49)] == [(64, 128), (64, 64)]
    assert matmul("sm_90", 1793, columns=4096)[:2] == (64, 128)  # fewer columns, fewer programs


@pytest.mark.parametrize("arch", MULTIPROCESSORS)
def test_elementwise_kernels_use_as_many_threads_everywhere(arch):
    arch = Arch(arch)
    for head_dim in (128, 256):
        assert rope.heuristic(head_dim, arch) == {"BLOCK_T": 2, "BLOCK_H": 8, "num_warps": 128 // arch.warp_size}
    for head_dim in (8, 72, 126):
        assert rope.heuristic(head_dim, arch) == {"BLOCK_T": 4, "BLOCK_H": 16, "num_warps": 64 // arch.warp_size}
    assert position_embedding_2d.heuristic(arch) == {"BLOCK_T": 4, "BLOCK_C": 128, "num_warps": 64 // arch.warp_size}


def test_the_parts_of_a_head_cover_it():
    for arch in map(Arch, ("sm_80", "sm_90", "sm_100", "gfx942")):
        for head_dim in range(8, 264, 8):
            main, qk_tail, pv_tail = head_parts(head_dim, arch).values()
            tails = {qk_tail, pv_tail}
            assert all(number & (number - 1) == 0 for number in (main, *tails)) and main >= 16
            assert main + min(tails) >= head_dim and max(tails) < main  # two parts cover the head
            assert (tails == {0}) == (head_dim <= main)
            assert tails == {0} or (qk_tail >= 16 and max(tails) <= max(16, 2 * (head_dim - main)))
            assert main <= max(16, 2 * head_dim - 16)
    parts = {name: head_parts(72, Arch(name))["PV_TAIL"] for name in ("sm_80", "sm_90", "sm_120", "sm_100", "sm_103", "gfx942")}
    narrow = 8 if varlen_attention.TRITON_VERSION >= (3, 5) else 16
    assert parts == {"sm_80": narrow, "sm_90": narrow, "sm_120": narrow, "sm_100": 16, "sm_103": 16, "gfx942": 16}
    assert [head_parts(head_dim, Arch("sm_90"))["PV_TAIL"] for head_dim in (40, 72, 80, 88, 136)] == [narrow, narrow, 16, 32, 16]
    assert [head_parts(head_dim, Arch("sm_90"))["MAIN"] for head_dim in (8, 72, 96, 104, 128, 136, 200)] == [
        16,
        64,
        64,
        128,
        128,
        128,
        256,
    ]


def test_old_versions_of_triton_have_no_tail_of_8(monkeypatch):
    for version, tail in (((3, 4), 16), ((3, 5), 8), ((4, 0), 8)):
        monkeypatch.setattr(varlen_attention, "TRITON_VERSION", version)
        assert head_parts.__wrapped__(72, Arch("sm_90")) == {"MAIN": 64, "QK_TAIL": 16, "PV_TAIL": tail}


def test_key_blocks_have_the_widths_of_the_parts():
    assert key_blocks(32, {"MAIN": 64, "QK_TAIL": 16, "PV_TAIL": 8}) == [[32, 1, 64], [32, 1, 16], [32, 1, 64], [32, 1, 8]]
    assert key_blocks(64, {"MAIN": 128, "QK_TAIL": 0, "PV_TAIL": 0}) == [[64, 1, 128], None, [64, 1, 128], None]


def test_heads_per_l2_group():
    megabyte = 2**20
    assert [heads_per_l2_group(16, 1, size * megabyte) for size in (1, 2, 3, 16, 17)] == [16, 8, 4, 1, 1]
    assert [heads_per_l2_group(6, 4, size * megabyte) for size in (2, 4, 5, 8)] == [24, 12, 12, 8]
    assert heads_per_l2_group(32, 1, 1) == 32
    assert heads_per_l2_group(8, 4, 0) == 32 and heads_per_l2_group(1, 1, 2**40) == 1


@pytest.mark.parametrize("norm", [False, True])
def test_pairs_of_rope_cover_half_of_a_head(norm):
    for head_dim in range(2, 258, 2):
        pairs, tail, vector = rope.cover_pairs(head_dim, norm).values()
        half = head_dim // 2
        assert pairs + tail >= half and all(number & (number - 1) == 0 for number in (pairs, tail, vector))
        assert half % vector == 0 and (half // vector) % 2 == 1
        if norm or half & (half - 1) == 0:
            assert tail == 0 and pairs < max(2 * half, 2)
        else:
            assert pairs < half and 0 < tail <= pairs
    assert rope.cover_pairs(72, False) == {"PAIRS": 32, "TAIL": 4, "VECTOR": 4}


def test_strides_are_passed_in_units_of_8(monkeypatch):
    """The JIT specializes on divisibility by 16 only; a stride of 72 in units of 8 keeps accesses wide."""
    found = []
    monkeypatch.setattr(Kernel, "_launch", lambda _, grid, *arguments, **constants: found.append((arguments, constants)))
    cu_seqlens, inv_freq = torch.tensor([0, 9], dtype=torch.int32), torch.ones(4)
    ids, corners = torch.zeros(1, 9, dtype=torch.int32), (torch.zeros(9, 4, dtype=torch.int32), torch.zeros(9, 4))

    def heads(width):
        return torch.zeros(9, 3, width)[..., :8]

    cache = torch.zeros(1, 12, 3, 8)
    aligned, odd = heads(72), heads(75)
    for position in range(3):
        tensors = [odd if i == position else aligned for i in range(3)]
        varlen_attention.varlen_attention(*tensors, cu_seqlens, 9, 0.1, False, False)
        arguments, constants = found.pop()
        assert constants["STRIDE_UNIT"] == 1 and arguments[-3:] == tuple(x.stride(1) for x in tensors)
        assert [constants[f"STRIDE_{name}"] for name in "QKV"] == [x.stride(0) for x in tensors]
        strides = tuple(stride for x in tensors for stride in x.stride()[:2])
        if position < 2:
            rope.rope(*tensors[:2], ids, inv_freq, [4])
            arguments, constants = found.pop()
            assert constants["STRIDE_UNIT"] == 1 and arguments[13:19] == (*strides[:4], 0, 0)
        rope.rope_to_cache(*tensors, ids, inv_freq, [4], cache, cache, torch.arange(9))
        arguments, constants = found.pop()
        assert constants["STRIDE_UNIT"] == 1 and arguments[13:19] == strides and arguments[21:] == (9, 12)
    varlen_attention.varlen_attention(aligned, aligned, aligned, cu_seqlens, 9, 0.1, False, False)
    assert found[-1][1]["STRIDE_UNIT"] == 8 and found.pop()[0][-3:] == (9, 9, 9)
    rope.rope(aligned, aligned, ids, inv_freq, [4])
    assert found[-1][1]["STRIDE_UNIT"] == 8 and found.pop()[0][13:19] == (27, 9, 27, 9, 0, 0)
    rope.rope_to_cache(aligned, aligned, aligned, ids, inv_freq, [4], cache, cache, torch.arange(9))
    assert found[-1][1]["STRIDE_UNIT"] == 8 and found.pop()[0][13:19] == (27, 9) * 3
    for width, unit in ((80, 8), (84, 1)):
        position_embedding_2d.position_embedding_2d(torch.zeros(9, width)[:, :8], torch.zeros(4, 8), *corners)
        arguments, constants = found.pop()
        assert constants["STRIDE_UNIT"] == unit and arguments[-1] == width // unit


def test_rope_uses_64_bit_offsets_where_a_block_reaches_2_31_elements(monkeypatch):
    found = []
    monkeypatch.setattr(Kernel, "_launch", lambda *_, **constants: found.append(constants["INT64_OFFSETS"]))
    block, near = {"BLOCK_T": 4, "BLOCK_H": 1, "num_warps": 4}, torch.empty(1, 2, 8, device="meta")
    slots = torch.zeros(1, dtype=torch.int64)
    # Two heads and a block of four tokens reach twice the head stride and four times the token stride
    for token, head, is_far in ((8, 2**30 - 24, False), (8, 2**30 - 16, True), (2**29 - 8, 8, False), (2**29 - 4, 8, True)):
        far = torch.empty_strided((1, 2, 8), (token, head, 1), device="meta")
        for q, k in ((far, near), (near, far)):
            rope.rope(q, k, torch.zeros(1, 1, dtype=torch.int32), torch.ones(4), [4], config=block)
            assert found.pop() == is_far, (token, head)
        rope.rope_to_cache(
            near, near, far, torch.zeros(1, 1, dtype=torch.int32), torch.ones(4), [4], *[near[None]] * 2, slots, config=block
        )
        assert found.pop() == is_far, (token, head)


def test_small_numbers():
    assert [next_power_of_2(number) for number in (0, 1, 2, 3, 4, 5, 1024, 1025)] == [1, 1, 2, 4, 4, 8, 1024, 2048]
    assert [cdiv(number, 4) for number in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]
    assert [dtype_name(dtype) for dtype in (*HALF, torch.float32)] == ["float16", "bfloat16", "float32"]


def test_candidates_fit_a_multiprocessor():
    """Registers: 16 rows per warp at least. Shared memory: a lower bound of the pipeline's buffers in bytes."""
    attention, matmuls = kernel_spec("varlen_attention"), kernel_spec("linear")
    vision, text = (TuningShape("varlen_attention", part, 1, 4096) for part in ("vision", "text"))
    sm_90, amd = Arch("sm_90"), Arch("gfx942")
    tried = [config for config in attention.candidates(vision, sm_90, {}) if config["backend"] == "triton"]
    assert min(config["BLOCK_M"] // config["num_warps"] for config in tried) == 16
    assert {config["num_stages"] for config in tried} == {1, 2, 3, 4} and {config["BLOCK_N"] for config in tried} == {32, 64, 128}
    config = {"BLOCK_N": 64, "num_stages": 3, "BLOCK_K": 32}
    assert attention.shared_bytes(vision, config, sm_90) == 2 * 64 * 72 * 3 * 2
    assert attention.shared_bytes(text, config, amd) == 2 * 64 * 128 * 2 * 2
    assert (matmuls.shared_bytes(vision, config, sm_90), matmuls.shared_bytes(vision, config, amd)) == (
        64 * 32 * 3 * 2,
        64 * 32 * 2 * 2,
    )
    assert MAX_BLOCK_SIZES["BLOCK_M"] == max(config["BLOCK_M"] for config in tried)
