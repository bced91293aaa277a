"""The run on a GPU: every candidate pruned, checked and timed; the best go into the device's table after each shape."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from keye_kernels.tools.compile import CHIPS
from keye_kernels.triton import tiles
from keye_kernels.triton.matmul import multiprocessors
from keye_kernels.triton.tiles import Config

from .candidates import candidates, refine
from .checking import Checker
from .choosing import Measured, choose
from .kernels import DTYPES, heuristic, table_key
from .problems import make_problem
from .pruning import Compiler, Variant, compiler
from .records import Record, Records
from .shapes import Shape

MARGIN = 0.02  # of a median: less is noise, and the heuristic's tile stays
HOPELESS = 1.1  # times the fastest so far: a tile that a glance finds slower is not timed at length


@dataclass(frozen=True)
class Machine:
    """What a sweep needs of the machine it runs on; tests pass one of their own."""

    device: torch.device
    target: str
    processors: int
    # A launch and the fastest median so far, to milliseconds: median, 20th and 80th percentile
    bench: Callable[[Callable[[], Any], float | None], list[float]]
    compiler: Callable[[], AbstractContextManager[Compiler]] = compiler


def on_this_gpu() -> Machine:
    """The current CUDA or ROCm device, timed by Triton's `do_bench`."""
    from triton.testing import do_bench

    quantiles = [0.5, 0.2, 0.8]

    def bench(run: Callable[[], Any], fastest: float | None) -> list[float]:
        glance = do_bench(run, warmup=1, rep=5, quantiles=quantiles)
        hopeless = fastest is not None and glance[0] > HOPELESS * fastest
        return glance if hopeless else do_bench(run, quantiles=quantiles)

    device = torch.device("cuda", torch.cuda.current_device())
    # Two cores are left to the launches: one that waits for a compiler is timed with its wait
    workers = max(1, (os.cpu_count() or 1) - 2)
    return Machine(device, tiles.target_name(device), multiprocessors(device)[1], bench, partial(compiler, workers))


@dataclass
class Outcome:
    """What a sweep has to say at its end."""

    device: str
    path: Path
    entries: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # by kernel
    records: list[Record] = field(default_factory=list)
    unwritable: OSError | None = None

    def to_text(self) -> str:
        lines = []
        for kernel, entries in self.entries.items():
            for entry in entries:
                case = " ".join(f"{name}={value}" for name, value in entry.items() if name not in tiles.RESULTS)
                tile = " ".join(f"{name}={value}" for name, value in entry["config"].items())
                usual = entry.get("heuristic_us")
                against = "the heuristic does not serve" if usual is None else f"heuristic {usual:.1f} us"
                lines.append(f"{kernel} {case}: {entry['median_us']:.1f} us ({against}): {tile}")
        reasons = [why for record in self.records for _, why in record.rejected]
        lines.append(f"{sum(len(record.timings) for record in self.records)} timed, {len(reasons)} rejected")
        if self.unwritable:
            lines.append(f"{self.path} cannot be written ({self.unwritable}); it would hold:")
            table = {
                "device": self.device,
                "triton": tiles.triton_version(),
                "method": tiles.TIMED,
                "kernels": self.entries,
            }
            lines.append(tiles.to_text(table))
        else:
            lines.append(f"launches on this device now take their tiles from {self.path}")
        return "\n".join(lines)


def sweep(
    machine: Machine, shapes: list[Shape], dtype: str, save_dir: str | Path | None = None, resume: bool = False
) -> Outcome:
    """Tunes each shape and saves after each.

    A folder that cannot be written is reported once and the sweep goes on. On Ctrl-C what was found is saved, the way to go
    on is printed, and KeyboardInterrupt passes. Raises RuntimeError if the device fails for good, or if a saved table does not
    serve launches.
    """
    name = tiles.device_name(machine.device)
    folder = Path(save_dir or tiles.folders()[0])
    records = Records(name, folder)
    outcome = Outcome(name, tiles.table_path(name, folder))
    plans = {shape: candidates(shape, dtype, machine.target, machine.processors, timed=True) for shape in shapes}
    opened = {shape: records.open(shape, dtype, resume) for shape in shapes}
    outcome.records = list(opened.values())
    left = {shape: [c for c in plans[shape] if not opened[shape].knows(c)] for shape in shapes}
    done = 0
    with (
        _looking_into(folder),
        machine.compiler() as compile_pool,
        tqdm(total=sum(map(len, left.values())), unit="tile", file=sys.stderr, disable=None) as progress,
    ):
        try:
            for shape in shapes:  # the pool compiles ahead of the clock
                compile_pool.submit(_variants(machine, shape, dtype, left[shape]))
            for shape in shapes:
                progress.set_description(str(shape))
                record = opened[shape]
                _try(machine, shape, dtype, left[shape], record, compile_pool, progress)
                fastest = [config for config, _ in sorted(record.timings, key=lambda timing: timing[1][0])]
                further = [c for c in refine(shape, machine.target, fastest) if not record.knows(c)]
                progress.total += len(further)
                _try(machine, shape, dtype, further, record, compile_pool, progress)
                _save(machine, records, shape.kernel, outcome)
                done += 1
        except (KeyboardInterrupt, RuntimeError):
            _save(machine, records, shape.kernel, outcome)
            where = "nothing could be saved" if outcome.unwritable else f"what was found is in {outcome.path}"
            print(f"stopped after {done} of {len(shapes)} shapes; {where}; the same command with --resume goes on",
                  file=sys.stderr)  # fmt: skip
            raise
    return outcome


def _variants(machine: Machine, shape: Shape, dtype: str, configs: list[Config]) -> list[Variant]:
    if machine.target not in CHIPS:
        return []
    return [Variant.of(machine.target, shape.kernel, shape.part, dtype, config, every=True) for config in configs]


def _try(
    machine: Machine, shape: Shape, dtype: str, configs: list[Config], record: Record, pool: Compiler, progress: tqdm
) -> None:
    """Rejects what does not compile, spills in a loop, does not fit or is wrong, and times the rest."""
    if not configs:
        return
    variants = _variants(machine, shape, dtype, configs)
    pool.submit(variants)
    unfit = [pool.failures(variant) for variant in variants] or [[]] * len(configs)
    problem = make_problem(shape, DTYPES[dtype], machine.device)
    checker = Checker(problem, DTYPES[dtype])
    for config, why in zip(configs, unfit, strict=True):
        try:
            wrong = "; ".join(why) or checker.error(config)
            if wrong:
                record.rejected.append((config, wrong))
            else:
                fastest = min((times[0] / 1000 for _, times in record.timings), default=None)
                times = machine.bench(lambda config=config: problem.launch(config), fastest)
                record.timings.append((config, [round(1000 * time, 2) for time in times]))
        except Exception as error:  # whatever compiler, driver or launch raise is the finding
            record.rejected.append((config, f"{type(error).__name__}: {str(error).strip()[:200]}"))
            _check_device(machine.device, config)
        progress.update()


def _check_device(device: torch.device, config: Config) -> None:
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except Exception as error:
            raise RuntimeError(
                f"the device no longer answers after {config}, which --resume passes over: {error}"
            ) from error


def _save(machine: Machine, records: Records, kernel: str, outcome: Outcome) -> None:
    """Writes records and table, and looks the new entries up as a launch does."""
    timed = [record for record in records.all if record.shape.kernel == kernel and record.timings]
    measured, times_of = [], {}
    for record in timed:
        default = heuristic(record.shape, record.dtype, machine.target, machine.processors)
        timings = [(default | config, times) for config, times in record.timings]  # an older one may lack a field
        costs = [(config, times[0]) for config, times in timings]
        measured.append(Measured(kernel, table_key(record.shape, record.dtype), default, costs))
        times_of[id(measured[-1])] = timings
    entries, expected = [], []
    for found, config in choose(measured, MARGIN):
        times = next(times for timed_config, times in times_of[id(found)] if timed_config == config)
        usual = next((cost for other, cost in found.costs if other == found.default), None)
        entry = {**found.key, "config": config} | dict(zip(("median_us", "p20_us", "p80_us"), times, strict=True))
        entries.append(entry if usual is None else {**entry, "heuristic_us": usual})
        expected.append((found, config))
    outcome.entries[kernel] = entries
    try:
        records.save()
        if entries:
            tiles.save(outcome.device, kernel, entries, outcome.path.parent)
    except OSError as error:
        if outcome.unwritable is None:
            print(f"{outcome.path} cannot be written: {error}; the sweep goes on and prints its table", file=sys.stderr)
        outcome.unwritable = error
        return
    for found, config in expected:
        served = tiles.tile(kernel, machine.device, found.key, found.default)
        if served != found.default | config:
            raise RuntimeError(f"{outcome.path} does not serve {found.key}: launches would take {served}, not {config}")


@contextmanager
def _looking_into(folder: Path) -> Iterator[None]:
    """Launches look into the sweep's folder first: the projector's second product is timed with its new tile."""
    before = os.environ.get("KEYE_KERNELS_TILES")
    os.environ["KEYE_KERNELS_TILES"] = str(folder)
    tiles.clear_cache()
    try:
        yield
    finally:
        if before is None:
            del os.environ["KEYE_KERNELS_TILES"]
        else:
            os.environ["KEYE_KERNELS_TILES"] = before
        tiles.clear_cache()
