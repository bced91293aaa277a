"""The run without a GPU: every candidate compiled ahead of time and ranked by `ranking`, nothing timed."""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from keye_kernels.triton import tiles
from keye_kernels.triton.tiles import Config

from .candidates import candidates
from .choosing import Measured, choose
from .kernels import own_heuristic, table_key
from .pruning import Compiler, Variant, compiler
from .ranking import RATES, rank
from .shapes import Shape

MARGIN = 0.25  # by which a rank must beat the heuristic's: about how far these terms are from the truth
COST = (
    "clocks = max(max(tensor, issue, exp2, l2) / share of latency hidden, memory, latency), from machine code and data sheets: "
    "keye_kernels/autotune/ranking.py; the heuristic's tile stays unless another is a quarter cheaper"
)
# What decides a tile without a clock; the rest of a configuration comes from the heuristic at launch
STORED = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_T", "BLOCK_H", "BLOCK_C", "num_warps", "num_stages")

logger = logging.getLogger(__name__)


@dataclass
class Ranked:
    """A target's tables, in memory."""

    target: str
    entries: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # by kernel
    notes: list[str] = field(default_factory=list)  # what was rejected, and why


def dry_run(
    targets: list[str], shapes: list[Shape], dtype: str, save_dir: str | Path | None = None, workers: int | None = None
) -> list[Ranked]:
    """Ranks the shapes for each target; with `save_dir`, writes SAVE_DIR/TARGET.json after each kernel.

    A tile that cannot be compiled, spills in a loop, or passes what a block may have, in any variant it would serve, is
    never chosen. Raises OSError where `save_dir` cannot be written.
    """
    kernels = list(dict.fromkeys(shape.kernel for shape in shapes))
    with (
        compiler(workers) as compile_pool,
        tqdm(total=len(targets) * len(shapes), desc="ranking", unit="shape", file=sys.stderr, disable=None) as progress,
    ):
        ranked = []
        for target in targets:
            result = Ranked(target)
            plans = {shape: candidates(shape, dtype, target, RATES[target].processors, timed=False) for shape in shapes}
            for shape, tried in plans.items():
                compile_pool.submit(_variant(target, shape, dtype, config) for config in tried)
            for kernel in kernels:
                tried = {shape: configs for shape, configs in plans.items() if shape.kernel == kernel}
                result.entries[kernel] = _rank_kernel(target, tried, dtype, compile_pool, result, progress)
                if save_dir is not None:
                    remarks = {"card": RATES[target].card, "processors": RATES[target].processors, "cost": COST}
                    entries = result.entries[kernel]
                    try:
                        tiles.save(target, kernel, entries, save_dir, tiles.RANKED, **remarks)
                    except OSError as error:
                        result.notes.append(f"{tiles.table_path(target, save_dir)} cannot be written: {error}")
                        save_dir = None
            ranked.append(result)
    return ranked


def _variant(target: str, shape: Shape, dtype: str, config: Config, every: bool = False) -> Variant:
    return Variant.of(target, shape.kernel, shape.part, dtype, config, every)


def _rank_kernel(
    target: str,
    plans: dict[Shape, list[Config]],
    dtype: str,
    compile_pool: Compiler,
    result: Ranked,
    progress: tqdm,
) -> list[dict[str, Any]]:
    measured, ranks = {}, {}
    for shape, tried in plans.items():
        default = own_heuristic(shape, dtype, target, RATES[target].processors)
        costs = []
        for config in tried:
            variant = _variant(target, shape, dtype, config)
            if failures := compile_pool.failures(variant):
                result.notes.append(f"{target} {shape.kernel} {shape.part}: {_short(config)}: {'; '.join(failures)}")
                continue
            terms = ranks[shape, variant.config] = rank(shape, target, config, compile_pool.reports(variant)[0])
            costs.append((config, terms["clocks"]))
        measured[shape] = Measured(shape.kernel, table_key(shape, dtype), default, costs)
        progress.update()
    # The winners in all their variants; one that fails there makes room for the next
    while True:
        chosen = choose(measured.values(), MARGIN)
        shape_of = {id(found): shape for shape, found in measured.items()}
        served = [(shape_of[id(found)], found, config) for found, config in chosen]
        everything = [_variant(target, shape, dtype, config, every=True) for shape, _, config in served]
        compile_pool.submit(everything)
        failed = [(shape, config, why) for variant, (shape, _, config) in zip(everything, served, strict=True)
                  if (why := compile_pool.failures(variant))]  # fmt: skip
        if not failed:
            break
        for shape, config, why in failed:
            result.notes.append(f"{target} {shape.kernel} {shape.part}: {_short(config)}: {'; '.join(why)}")
            for other, found in measured.items():
                if other.part == shape.part:
                    found.costs = [cost for cost in found.costs if cost[0] != config]
    entries = []
    for shape, found, config in served:
        terms = ranks[shape, _variant(target, shape, dtype, config).config]
        usual = ranks.get((shape, _variant(target, shape, dtype, found.default).config), {}).get("clocks")
        note = "is this tile" if config == found.default else f"{usual} clocks" if usual else "does not serve"
        stored = {name: config[name] for name in STORED if name in config}
        entries.append({**found.key, "config": stored, "rank": terms | {"shape": str(shape), "heuristic": note}})
    return entries


def _short(config: Config) -> str:
    return " ".join(f"{name}={config[name]}" for name in sorted(config) if name in STORED)


def report(ranked: list[Ranked]) -> str:
    """For people: one line a case."""
    lines = ["ranked, not timed"]
    for result in ranked:
        for kernel, entries in result.entries.items():
            for entry in entries:
                terms = entry["rank"]
                lines.append(
                    f"{result.target:8} {terms['shape']:45} {_short(entry['config']):60} "
                    f"{terms['clocks']:>10} clocks  (heuristic: {terms['heuristic']})"
                )
            if not entries:
                lines.append(f"{result.target:8} {kernel}: no candidate serves; the heuristic stays")
    return "\n".join(lines)
