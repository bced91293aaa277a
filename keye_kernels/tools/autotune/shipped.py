"""Compiles what the package's tables hold, in every variant that an entry serves, and says what cannot serve.

    python -m keye_kernels.tools.autotune.shipped [--target sm_90,gfx942]

Exit code 1 if an entry does not compile, spills in a loop, or needs more registers or shared memory than its chip has.
"""

import argparse
import json
import sys

from keye_kernels.tools.compile import CHIPS
from keye_kernels.triton import tiles

from .command import names
from .kernels import DTYPES
from .pruning import Variant, compiler

DTYPE_NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}
TIMED_CARDS = {"sm_90": ["NVIDIA H200"]}  # of a target, those with a table that was timed on them


def shipped_variants(target: str) -> list[Variant]:
    """Each tile of the tables of a target and of its cards once; the projector's with either place of its statistics that a
    launch may choose."""
    found = {}
    for name in (target, *TIMED_CARDS.get(target, [])):
        table = json.loads(tiles.table_path(name, tiles.PACKAGE_TABLES).read_text(encoding="utf-8"))
        for kernel, entry in ((kernel, entry) for kernel, entries in table["kernels"].items() for entry in entries):
            for config in _as_launched(kernel, target, entry["config"]):
                dtype = DTYPE_NAMES[entry["dtype"]]
                found[Variant.of(target, kernel, _part(kernel, entry), dtype, config, every=True)] = None
    return list(found)


def _part(kernel: str, entry: dict) -> str:
    if kernel in ("rope", "varlen_attention"):
        return "text" if entry["head_dim"] == 128 else "vision"
    return entry.get("order", "vision")


def _as_launched(kernel: str, target: str, config: tiles.Config) -> list[tiles.Config]:
    if kernel not in ("rope", "position_embedding_2d"):
        config = {"loads": "pointers", "path": "triton", **config}
    if kernel != "patch_merge":
        return [config]
    # The launch decides by its rows; on AMD it never takes them in the product
    choices = ("separate", "fused") if target.startswith("sm_") else ("separate",)
    return [{"statistics": choice, **config} for choice in choices]


def failures(variants: list[Variant], workers: int | None = None) -> list[str]:
    """What is wrong with them, in words."""
    with compiler(workers) as pool:
        pool.submit(variants)
        return [f"{v.target} {v.kernel} {v.part} {dict(v.config)}: {why}" for v in variants for why in pool.failures(v)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m keye_kernels.tools.autotune.shipped", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--target", default=",".join(CHIPS))
    targets = names(parser.parse_args(arguments).target, tuple(CHIPS), "target")
    variants = [variant for target in targets for variant in shipped_variants(target)]
    found = failures(variants)
    print("\n".join([f"{len(variants)} tiles of {', '.join(targets)} compiled, {len(found)} failures", *found]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
