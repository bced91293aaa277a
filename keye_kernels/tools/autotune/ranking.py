"""Ranks tiles without running them: the clocks that a launch takes at the least, from machine code and data sheets.

    clocks = max(compute / hidden, memory, latency),   compute = max(tensor, issue, exp2, l2)

of the busiest multiprocessor, on which ceil(programs / multiprocessors) programs run:

    tensor   multiplies issued, padding included, over the tensor cores' rate
    issue    instructions of all lanes (those in the hot loop times its passes, the others once) over the lanes a clock
    exp2     attention: exponentials over 16 a clock
    l2       bytes that programs ask for over 48 a clock
    hidden   the share of compute's latency that is hidden: resident warps over 8 (16 without tensor cores), at the most 1
    memory   of the whole chip: inputs once and outputs once over the bandwidth
    latency  1000 clocks of memory for each round of resident programs

An order of tiles, not a prediction of time: caches, clocks under load and the compiler's pipelining are not in it.
"""

from dataclasses import dataclass
from math import ceil

from keye_kernels.tools.compile import Report
from keye_kernels.triton.tiles import Config
from keye_kernels.triton.varlen_attention import head_parts

from .kernels import CHANNELS, HIDDEN, OUT, arch_of, attention_part, warp_size
from .shapes import Shape

EXP2, L2_BYTES = 16, 48  # a clock and multiprocessor; L2: an A100's 5120 bytes over its 108
LATENCY = 1000  # clocks
HIDING_WARPS = {True: 8, False: 16}  # with and without tensor cores
BYTES = 2  # of a bf16 or fp16


@dataclass(frozen=True)
class Rates:
    """What a card of a target does in a clock, from its data sheet."""

    card: str
    processors: int
    tensor: int  # bf16 operations of a multiprocessor, sums in float32
    memory: int  # bytes of the whole card
    lanes: int = 128  # of a multiprocessor


RATES = {
    "sm_80": Rates("A100 80GB", 108, 2048, 1450),
    "sm_86": Rates("RTX 3090", 82, 512, 550),
    "sm_89": Rates("RTX 4090", 128, 512, 400),
    "sm_90": Rates("H100 SXM", 132, 4096, 1830),
    "sm_100": Rates("B200", 148, 8192, 4300),
    "sm_120": Rates("RTX 5090", 170, 512, 740),
    "gfx942": Rates("MI300X", 304, 2048, 2520, lanes=64),
}


@dataclass(frozen=True)
class Work:
    """A launch in a tile; all but `bytes` of one program."""

    programs: int
    passes: float  # of the hot loop
    flops: float = 0
    exp2: float = 0
    requested: float = 0  # bytes
    longest: float = 1  # the longest program over the mean
    needed_flops: float = 0  # of the launch
    bytes: float = 0  # of the launch


def rank(shape: Shape, target: str, config: Config, report: Report) -> dict[str, float]:
    """Clocks and the terms they come from."""
    rates, work = RATES[target], _work(shape, target, config)
    lanes = config["num_warps"] * warp_size(target)
    instructions = report.instructions - report.loop_instructions + report.loop_instructions * work.passes
    busiest = ceil(work.programs / rates.processors)
    share = max(busiest, work.longest)
    terms = {
        "tensor": share * work.flops / rates.tensor,
        "issue": share * instructions * lanes / rates.lanes,
        "exp2": share * work.exp2 / EXP2,
        "l2": share * work.requested / L2_BYTES,
    }
    warps = min(report.resident_blocks, busiest) * config["num_warps"]
    compute = max(terms.values()) / min(1.0, warps / HIDING_WARPS[work.flops > 0])
    terms["memory"] = work.bytes / rates.memory
    terms["latency"] = ceil(busiest / report.resident_blocks) * LATENCY
    clocks = max(compute, terms["memory"], terms["latency"])
    found = {name: round(value) for name, value in {"clocks": clocks, **terms}.items() if value} | {"warps": warps}
    if work.needed_flops:
        found["padding"] = round(work.programs * work.flops / work.needed_flops, 3)
    return found


def _work(shape: Shape, target: str, config: Config) -> Work:
    return {
        "rope": _rope,
        "position_embedding_2d": _position_embedding,
        "varlen_attention": _attention,
        "linear": _linear,
        "patch_merge": _patch_merge,
    }[shape.kernel](shape, target, config)


def _rope(shape: Shape, target: str, config: Config) -> Work:
    row = (32 + 8) * 128 if shape.part == "text" else (16 + 16) * 72
    return Work(ceil(shape.total / config["BLOCK_T"]), passes=1, bytes=2 * shape.total * row * BYTES)


def _position_embedding(shape: Shape, target: str, config: Config) -> Work:
    passes = ceil(CHANNELS / config["BLOCK_C"])
    requested = config["BLOCK_T"] * CHANNELS * 6 * BYTES  # four rows of the table, the features, the output
    total = 2 * shape.total * CHANNELS * BYTES
    return Work(ceil(shape.total / config["BLOCK_T"]), passes, requested=requested, bytes=total)


def _attention(shape: Shape, target: str, config: Config) -> Work:
    heads, key_heads, head_dim = attention_part(shape.part)
    parts, causal = head_parts(head_dim, arch_of(target)), shape.part == "text"
    block_m, block_n, keys = config["BLOCK_M"], config["BLOCK_N"], shape.size
    tiles = ceil(keys / block_m)
    # The keys that a program takes: all, or those up to its diagonal; the last ones by half blocks
    first = [tile * block_m for tile in range(tiles)] if causal else [0] * tiles
    seen = [min(keys, row + block_m) if causal else keys for row in first]
    whole = [(row if causal else keys) // block_n * block_n for row in first]
    half = max(block_n // 2, 16)
    taken = [w + ceil((s - w) / half) * half for s, w in zip(seen, whole, strict=True)]
    mean = sum(taken) / tiles
    columns = 2 * parts["MAIN"] + parts["QK_TAIL"] + parts["PV_TAIL"]
    return Work(
        programs=shape.count * tiles * heads,
        passes=mean / block_n,
        flops=2 * block_m * mean * columns,
        exp2=block_m * mean,
        requested=mean * 2 * head_dim * BYTES,
        longest=max(taken) / mean,
        needed_flops=4 * head_dim * heads * shape.count * (keys * (keys + 1) / 2 if causal else keys**2),
        bytes=shape.total * 2 * (heads + key_heads) * head_dim * BYTES,
    )


def _linear(shape: Shape, target: str, config: Config) -> Work:
    return _product(shape.total, HIDDEN, OUT, config)


def _patch_merge(shape: Shape, target: str, config: Config) -> Work:
    return _product(shape.total, HIDDEN, HIDDEN, config)


def _product(rows: int, width: int, columns: int, config: Config) -> Work:
    block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
    return Work(
        programs=ceil(rows / block_m) * ceil(columns / block_n),
        passes=width / config["BLOCK_K"],
        flops=2 * block_m * block_n * width,
        requested=(block_m + block_n) * width * BYTES,
        needed_flops=2 * rows * width * columns,
        bytes=(rows * (width + columns) + width * columns) * BYTES,
    )
