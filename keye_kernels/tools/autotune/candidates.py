"""Which tiles are tried: around each kernel's heuristic, and what cannot fit a chip left out before it is compiled."""

from keye_kernels.tools.compile import CHIPS
from keye_kernels.triton.descriptors import loads_of
from keye_kernels.triton.patch_merge import INDEX_STAGES
from keye_kernels.triton.tiles import Config

from .kernels import arch_of, heuristic, own_heuristic, warp_size
from .shapes import Shape

FEW = 3
LONG = 1024  # tokens of a segment: past them attention hides the 35 us that the host takes for its four descriptors
ROWS = 16  # that a warp holds at the least: the height of a tensor core's product
OPERAND = 2  # bytes of a bf16 or fp16


def candidates(shape: Shape, dtype: str, target: str, processors: int, timed: bool) -> list[Config]:
    """The tiles to try first for a shape, the heuristic's before all.

    Unless `timed`, they are fewer, and what only a clock can tell apart is left as the heuristic has it: attention's
    stages, pointers or descriptors, a product's path, and who takes the projector's statistics. Products keep the
    heuristic's K step and stages here; `refine` varies those of the best.
    """
    first = (heuristic if timed else own_heuristic)(shape, dtype, target, processors)
    propose = {
        "rope": _rope,
        "position_embedding_2d": _position_embedding,
        "varlen_attention": _attention,
        "linear": _linear,
        "patch_merge": _patch_merge,
    }[shape.kernel]
    proposed = [first, *(first | fields for fields in propose(shape, target, first, timed))]
    unique = {tuple(sorted(config.items())): config for config in proposed}
    return [config for config in unique.values() if config == first or _may_fit(shape, target, config)]


def refine(shape: Shape, target: str, fastest: list[Config]) -> list[Config]:
    """What to time in a second round: other K steps and stages of a product's fastest tiles, `fastest` first."""
    if shape.kernel not in ("linear", "patch_merge"):
        return []
    varied = [
        config | {"BLOCK_K": k, "num_stages": stages}
        for config in [config for config in fastest if config.get("path") != "cublas"][:FEW]
        for k in (32, 64, 128)
        for stages in (2, 3, 4, 5)
    ]
    return [config for config in varied if _may_fit(shape, target, config)]


def _rope(shape: Shape, target: str, first: Config, timed: bool) -> list[Config]:
    # threads for a tile of tokens x heads
    tiles = [(1, 8, 64), (1, 8, 128), (4, 8, 256), (2, 8, 64), (2, 4, 64), (4, 4, 128), (8, 4, 256)]
    if shape.part == "vision":
        tiles = [(2, 16, 128), (4, 16, 128), (8, 8, 128), (2, 16, 64), (4, 8, 64), (8, 16, 128), (1, 16, 64)]
    width = warp_size(target)
    return [{"BLOCK_T": t, "BLOCK_H": h, "num_warps": n // width} for t, h, n in (tiles if timed else tiles[:FEW])]


def _position_embedding(shape: Shape, target: str, first: Config, timed: bool) -> list[Config]:
    # 1152 = 9 x 128: wider blocks leave lanes idle
    tiles = [(1, 128, 64), (2, 128, 64), (8, 128, 128), (4, 128, 128), (8, 128, 64), (16, 128, 256)]
    width = warp_size(target)
    return [{"BLOCK_T": t, "BLOCK_C": c, "num_warps": n // width} for t, c, n in (tiles if timed else tiles[:FEW])]


def _attention(shape: Shape, target: str, first: Config, timed: bool) -> list[Config]:
    stages = (1, 2, 3, 4) if timed else (first["num_stages"],)
    torchs = [{"path": "torch"}] if timed and target.startswith("sm_") else []
    all_loads = loads_of(arch_of(target)) if timed and shape.size > LONG else (first["loads"],)
    return torchs + [
        {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": s, "loads": loads}
        for m in (64, 128)
        for n in ((32, 64, 128) if timed else (64, 128))
        for warps in (4, 8)
        for s in stages
        for loads in all_loads
        # 128 x 128 scores in 4 warps take every register there is
        if m // warps >= ROWS and (timed or m * n < 128 * 128 * warps // 4)
    ]


def _product(shape: Shape, target: str, first: Config, timed: bool) -> list[Config]:
    tiles = [(128, 256, 8), (128, 128, 8), (64, 128, 4), (64, 64, 4)]
    if timed:
        tiles += [(128, 128, 4), (64, 256, 8), (64, 256, 4)]
    return [
        {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "loads": loads}
        for m, n, warps in tiles
        for loads in (loads_of(arch_of(target)) if timed else (first["loads"],))
    ]


def _linear(shape: Shape, target: str, first: Config, timed: bool) -> list[Config]:
    products = _product(shape, target, first, timed)
    return [{"path": "cublas"}, *products] if timed else products


def _patch_merge(shape: Shape, target: str, first: Config, timed: bool) -> list[Config]:
    fused = _product(shape, target, first, timed=False)
    if not timed:
        return fused
    # Merged rows are read without an index
    indexed = shape.part == "raster" and target.startswith("sm_")
    stages = first["num_stages"] - (INDEX_STAGES if indexed else 0)
    plain = [{**tile, "path": "merged", "num_stages": stages} for tile in _product(shape, target, first, timed)]
    # A barrier orders no global stores on AMD, and fused statistics go through those
    statistics = ("separate", "fused") if target.startswith("sm_") else ("separate",)
    fused = [{**tile, "path": "triton", "statistics": s} for tile in fused for s in statistics]
    return [{"path": "cublas"}, *plain, *fused]


def _may_fit(shape: Shape, target: str, config: Config) -> bool:
    """Whether the operands that a pipeline keeps in shared memory fit a block; a lower bound of what the compiler takes."""
    if config.get("path") in ("cublas", "torch") or "num_stages" not in config:
        return True
    if shape.kernel == "varlen_attention":
        head = 72 if shape.part == "vision" else 128
        one_stage = 2 * config["BLOCK_N"] * head * OPERAND
    else:
        one_stage = config["BLOCK_N"] * config["BLOCK_K"] * OPERAND
    buffers = config["num_stages"] if target.startswith("sm_") else config["num_stages"] - 1
    return one_stage * buffers <= CHIPS[target].shared_by_block
