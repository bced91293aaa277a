"""Attention of packed segments: which tile, which kernel, and its launch (`varlen_attention_kernel` computes).

Where a timed table says so, the FlashAttention-2 that torch brings serves in place of the kernel here.
"""

import math
from functools import cache

import torch
from torch import Tensor

from .descriptors import Block, describe, describe_types, loads_of
from .launch import Kernel
from .schedule import tile_schedule
from .spec import TRITON_VERSION, CompileSpec
from .tiles import Config, dtype_name, next_power_of_2, remember, tile
from .varlen_attention_kernel import varlen_attention_fwd_kernel

TCGEN05 = (10, 11)  # major capabilities whose tensor cores keep their sums in a memory of their own
LOG2_E = math.log2(math.e)
NEAR_BYTES = 16 * 2**20  # of keys and values in use at a time: under half of the L2 cache of an A100 or H100


_launch = Kernel(varlen_attention_fwd_kernel)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    causal: bool,
    return_lse: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Launches `varlen_attention_fwd_kernel`; arguments and results as in `keye_kernels.reference.varlen_attention`.

    `max_seqlen` chooses the tile only and may be an upper bound; `config` is the tile (None: the table's or the
    heuristic's). Raises ValueError if `cu_seqlens` decreases or passes q.
    """
    (num_tokens, num_heads, head_dim), num_key_heads = q.shape, k.shape[1]
    if config is None:
        config = _config(q.device, q.dtype, head_dim, max_seqlen, causal)
    schedule = tile_schedule(cu_seqlens, config["BLOCK_M"], causal)
    if schedule.end_token > num_tokens:
        raise ValueError(f"cu_seqlens must end at or before q's {num_tokens} tokens, got {schedule.end_token}")
    covered = schedule.covers(num_tokens)  # no program writes tokens of no segment
    out = (torch.empty if covered else torch.zeros)(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((num_heads, num_tokens if return_lse else 0), dtype=torch.float32, device=q.device)
    if not covered:
        lse.fill_(-math.inf)
    num_tiles = len(schedule.entries)
    if num_tiles == 0:
        return out, lse

    if softmax_scale < 0:  # the kernel takes the scale out of a maximum
        q, softmax_scale = -q, -softmax_scale
    by_torch = config["path"] == "torch" and covered and not return_lse
    if by_torch and _is_for_torch(q, k, v, softmax_scale, schedule.longest):
        lengths = (cu_seqlens.contiguous(),) * 2 + (schedule.longest,) * 2
        # What torch.nn.attention.varlen calls, and older torch has as well
        attend = torch.ops.aten._flash_attention_forward
        return attend(q, k, v, *lengths, 0.0, causal, False, scale=softmax_scale)[0].contiguous(), lse
    # The JIT knows nothing weaker of an integer than "divisible by 16": a stride of 72 is handed over as 9 units of 8.
    (q_token, q_head, _), (k_token, k_head, _), (v_token, v_head, _) = q.stride(), k.stride(), v.stride()
    unit = 8 if not (q_head | k_head | v_head) % 8 else 1
    group = num_heads // num_key_heads
    near_heads = heads_that_stay_near(num_key_heads, group, 2 * schedule.longest * head_dim * k.element_size())
    parts = head_parts(head_dim, _arch(q.device))
    fetched = describe(config, *zip((k, k, v, v), key_blocks(config["BLOCK_N"], parts), strict=True))
    with torch.cuda.device_of(q):
        _launch(
            num_tiles * num_heads,
            out, lse, q, k, v, *fetched, schedule.entries,
            softmax_scale * LOG2_E, num_tokens, num_tiles, near_heads, q_head // unit, k_head // unit, v_head // unit,
            STRIDE_Q=q_token, STRIDE_K=k_token, STRIDE_V=v_token, STRIDE_UNIT=unit,
            NUM_HEADS=num_heads, GROUP=group, HEAD_DIM=head_dim, **parts, CAUSAL=causal, RETURN_LSE=return_lse,
            **launch_options(config),
        )  # fmt: skip
    return out, lse


def _is_for_torch(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, longest: int) -> bool:
    """Whether torch's FlashAttention-2 computes the same of these: half precision in steps of 16 bytes.

    It multiplies its mask by the scale, and takes segments of one token for a batch without gaps.
    """
    aligned = all(x.data_ptr() % 16 == 0 and not (x.stride(0) | x.stride(1)) % 8 for x in (q, k, v))
    return aligned and softmax_scale > 0 and longest > 1 and q.dtype in (torch.float16, torch.bfloat16) and q.is_cuda


def launch_options(config: Config) -> Config:
    """What the kernel takes of a tile."""
    return {name: config[name] for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")}


@remember
def _config(device: torch.device, dtype: torch.dtype, head_dim: int, max_seqlen: int, causal: bool) -> Config:
    key = tile_key(dtype, head_dim, max_seqlen, causal)
    return tile("varlen_attention", device, key, heuristic(_arch(device), head_dim, dtype))


def tile_key(dtype: torch.dtype, head_dim: int, max_seqlen: int, causal: bool) -> dict[str, int | str]:
    """What a tile table tells cases apart by."""
    mask = "causal" if causal else "none"
    return {"dtype": dtype_name(dtype), "head_dim": head_dim, "mask": mask, "max_seqlen": next_power_of_2(max_seqlen)}


@cache
def head_parts(head_dim: int, arch: int | str) -> dict[str, int]:
    """Powers of two that cover a head: 72 -> 64 + 16 for the scores (whose K is 16 or more) and 64 + 8 for the output.

    Three parts are not worth their code: 88 -> 64 + 32. A tail as wide as the main part joins it: 112 -> 128.
    """
    main = max(16, 1 << head_dim.bit_length() - 1)
    if head_dim <= main:
        return {"MAIN": main, "QK_TAIL": 0, "PV_TAIL": 0}
    tail = next_power_of_2(head_dim - main)
    if max(tail, 16) >= main:
        return {"MAIN": 2 * main, "QK_TAIL": 0, "PV_TAIL": 0}
    # tcgen05 has no 128 x 8 product, though Triton emits one; AMD's matrix cores and Triton 3.4 start at 16. Blocks of the
    # heads past 64 + 8 have too few keys to give every thread two channels of 8.
    narrow = isinstance(arch, int) and arch // 10 not in TCGEN05 and main <= 64 and TRITON_VERSION >= (3, 5)
    return {"MAIN": main, "QK_TAIL": max(tail, 16), "PV_TAIL": max(tail, 8 if narrow else 16)}


def key_blocks(block_n: int, parts: dict[str, int]) -> list[Block]:
    """[keys, heads, channels] of what is fetched of k, k's tail, v and v's tail at a time; None where there is no tail."""
    widths = parts["MAIN"], parts["QK_TAIL"], parts["MAIN"], parts["PV_TAIL"]
    return [[block_n, 1, width] if width else None for width in widths]


def heuristic(arch: int | str, head_dim: int, dtype: torch.dtype) -> Config:
    """The tile where no table has one: few instructions a score in the compiled loop, and no spill.

    It does not depend on the lengths of segments, BLOCK_N least of all: a query's sums are made in the same order whatever it
    is packed with. On sm_90 it is what an H200 was quick with at every length: two or three blocks of 4 warps on a
    multiprocessor, of which one computes exponentials while another multiplies. tcgen05 wants 128 rows, and mma.sync takes 13
    instructions a score with 64.
    """
    if dtype == torch.float32:  # no tensor cores: the operands of its products live in registers
        return _tile(32, 32, 8) if head_dim <= 80 else _tile(16, 16, 8)
    if isinstance(arch, str):
        return _tile(128, 64, 4) if head_dim <= 128 else _tile(64, 32, 4)
    if arch == 90 and head_dim <= 128:
        return _tile(128 if head_dim <= 80 else 64, 64, 4, num_stages=3)
    has_tcgen05 = arch // 10 in TCGEN05
    if head_dim <= (128 if has_tcgen05 else 80):
        return _tile(128, 128, 8)
    if head_dim <= 160 or arch == 90:
        return _tile(128, 64, 8)
    return _tile(128, 32, 8) if has_tcgen05 else _tile(64, 32, 4)


def _tile(block_m: int, block_n: int, num_warps: int, num_stages: int = 2) -> Config:
    tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}
    # Descriptors and torch's FlashAttention-2 where a table says so: only a clock tells them apart
    return {**tile, "loads": "pointers", "path": "triton"}


def heads_that_stay_near(num_key_heads: int, group: int, bytes_per_key_head: int) -> int:
    """How many query heads take each tile of the schedule before another head starts on it.

    All of them, where the keys and values of the longest segment fit NEAR_BYTES: the grid is then most work first, and programs
    that run at a time read the same segment. Past that, as many as fit; each round of heads is again most work first.
    """
    near = max(1, min(num_key_heads, NEAR_BYTES // bytes_per_key_head))
    return group * next(heads for heads in range(near, 0, -1) if num_key_heads % heads == 0)


@cache
def _arch(device: torch.device) -> int | str:
    """Capability as in sm_90, AMD's as "gfx942"; the interpreter counts as sm_90."""
    if device.type != "cuda":
        return 90
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


VISION, TEXT = (16, 16, 72), (32, 8, 128)  # query heads, key heads, head dim


def compile_spec(
    label: str,
    arch: int | str,
    config: Config,
    dtype: str,
    heads: int,
    key_heads: int,
    head_dim: int,
    causal: bool,
    return_lse: bool = False,
) -> CompileSpec:
    """One variant in a tile; `dtype` is Triton's name."""
    data, parts = f"*{dtype}:16", head_parts(head_dim, arch)
    fetched = describe_types(config, dtype, *key_blocks(config["BLOCK_N"], parts))
    # as the model calls it: q and k fresh from the rotation, v a view of the fused projection
    signature = {
        "out_ptr": data, "lse_ptr": "*fp32:16", "q_ptr": data, "k_ptr": data, "v_ptr": data,
        **dict(zip(("k_desc", "k_tail_desc", "v_desc", "v_tail_desc"), fetched, strict=True)),
        "schedule_ptr": "*i32:16", "scale": "fp32", "num_tokens": "i32", "num_tiles": "i32", "near_heads": "i32",
        "stride_q_head": "i32", "stride_k_head": "i32", "stride_v_head": "i32", "STRIDE_Q": heads * head_dim,
        "STRIDE_K": key_heads * head_dim, "STRIDE_V": (heads + 2 * key_heads) * head_dim, "STRIDE_UNIT": 8,
        "NUM_HEADS": heads, "GROUP": heads // key_heads, "HEAD_DIM": head_dim, **parts,
        "CAUSAL": causal, "RETURN_LSE": return_lse, "BLOCK_M": config["BLOCK_M"], "BLOCK_N": config["BLOCK_N"],
    }  # fmt: skip
    launch = config["num_warps"], config["num_stages"]
    return CompileSpec(varlen_attention_fwd_kernel, label, signature, *launch, uses_tensor_cores=dtype != "fp32")


def compile_specs(arch: int | str) -> list[CompileSpec]:
    """The vision tower's and the text model's variants that ship for a target."""

    def spec(label, dtype, heads, key_heads, head_dim, causal, return_lse=False, **fields):
        config = heuristic(arch, head_dim, torch.float32 if dtype == "fp32" else torch.bfloat16) | fields
        return compile_spec(label, arch, config, dtype, heads, key_heads, head_dim, causal, return_lse)

    described = "descriptors" in loads_of(arch)
    return [
        spec("vision bf16", "bf16", *VISION, causal=False),
        *([spec("vision bf16 descriptors", "bf16", *VISION, False, loads="descriptors")] if described else []),
        spec("vision bf16 lse", "bf16", *VISION, causal=False, return_lse=True),
        spec("vision fp16", "fp16", *VISION, causal=False),
        spec("vision fp32", "fp32", *VISION, causal=False),
        spec("text bf16", "bf16", *TEXT, causal=True),
        *([spec("text bf16 descriptors", "bf16", *TEXT, True, loads="descriptors")] if described else []),
        spec("text fp16", "fp16", *TEXT, causal=True),
        spec("text fp32", "fp32", *TEXT, causal=True),
    ]
