"""The sweep on a GPU: prunes, checks and times every candidate, and saves the fastest in the GPU's table after each shape."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tqdm import tqdm

from keye_kernels import reference
from keye_kernels.tools.time_box import TimeBox
from keye_kernels.triton import launch_config
from keye_kernels.triton.device import MULTIPROCESSORS, Arch, device_arch, device_name
from keye_kernels.triton.launch_config import Config
from keye_kernels.triton.registry import kernel_spec
from keye_kernels.triton.spec import TORCH_DTYPES, TuningShape

from .candidates import candidates, refinements
from .checking import Checker
from .choosing import MeasuredShape, choose
from .plan import LONG_RUN_MS, LONG_WARM_UP_MS, MAX_FINALISTS, QUANTILES, estimate, quick_timer, reserved
from .pruning import Compiler, TuningVariant, compiler
from .records import SweepRecord, SweepRecords

MARGIN = 0.02  # relative; smaller gains are noise, and the heuristic's config stays


@dataclass(frozen=True)
class Machine:
    """What a sweep needs of its machine; tests pass their own. Timers return ms: median, 20th and 80th percentile."""

    device: torch.device
    arch: Arch
    quick: Callable[[Callable[[], Any]], list[float]]  # of every correct config
    bench: Callable[[Callable[[], Any]], list[float]]  # of the fastest ones
    compiler: Callable[[], AbstractContextManager[Compiler]] = compiler


def on_this_gpu() -> Machine:
    """The current CUDA or ROCm device; the fastest configs are timed with Triton's `do_bench`."""
    from triton.testing import do_bench

    bench = partial(do_bench, warmup=LONG_WARM_UP_MS, rep=LONG_RUN_MS, quantiles=QUANTILES)
    device = torch.device("cuda", torch.cuda.current_device())
    # Two cores stay free for the launches: waiting for a compiler would be part of their time
    workers = max(1, (os.cpu_count() or 1) - 2)
    return Machine(device, device_arch(device), quick_timer(device), bench, partial(compiler, workers))


@dataclass
class SweepResult:
    """The table entries and records of a sweep, and the shapes that did not fit, or not completely, into its limit of time."""

    device: str
    path: Path
    entries: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # by kernel
    records: list[SweepRecord] = field(default_factory=list)
    unwritable: OSError | None = None
    left_out: list[TuningShape] = field(default_factory=list)

    def to_text(self) -> str:
        lines = []
        for kernel, entries in self.entries.items():
            for entry in entries:
                key = " ".join(f"{name}={value}" for name, value in entry.items() if name not in launch_config.NON_KEY_FIELDS)
                config = " ".join(f"{name}={value}" for name, value in entry["config"].items())
                heuristic = entry.get("heuristic_us")
                other = "the heuristic's was rejected" if heuristic is None else f"heuristic {heuristic:.1f} us"
                lines.append(f"{kernel} {key}: {entry['median_us']:.1f} us ({other}): {config}")
        reasons = [why for record in self.records for _, why in record.rejected]
        lines.append(f"{sum(len(record.timings) for record in self.records)} timed, {len(reasons)} rejected")
        for record in (one for one in self.records if one.rejected and not one.timings):
            lines.append(f"no config works for {record.shape}; the first is rejected with: {record.rejected[0][1]}")
        if self.left_out:
            names = "; ".join(map(str, self.left_out))
            lines.append(f"left out, because the time was over: {names}; run the same command with --resume to continue")
        if self.unwritable:
            lines.append(f"{self.path} cannot be written ({self.unwritable}); its content:")
            lines.append(launch_config.to_json(self.device, self.entries))
        else:
            lines.append(f"launches on this GPU now use {self.path}")
        return "\n".join(lines)


def sweep(
    machine: Machine,
    shapes: list[TuningShape],
    dtype: str,
    save_dir: str | Path | None = None,
    resume: bool = False,
    box: TimeBox | None = None,
) -> SweepResult:
    """Tunes each shape and saves after each. A folder that cannot be written is reported once, and the sweep continues.

    A shape is left out if it does not fit into the limit of time (`box`), or would take the time of later ones that matter more.
    On Ctrl-C, the results so far are saved, the command that resumes is printed, and KeyboardInterrupt is raised again. Raises
    RuntimeError where the device stopped responding, or launches do not find a saved entry.
    """
    box = box or TimeBox(None)
    name = device_name(machine.device)
    folder = Path(save_dir or launch_config.table_folders()[0])
    records = SweepRecords(name, folder)
    result = SweepResult(name, launch_config.table_path(name, folder))
    known = {shape: records.find(shape, dtype) if resume else None for shape in shapes}
    left = {
        shape: [c for c in candidates(shape, dtype, machine.arch) if not (known[shape] and known[shape].knows(c))]
        for shape in shapes
    }
    num_left = {shape: len(configs) for shape, configs in left.items()}
    done = 0
    with (
        _tables_from(folder),
        machine.compiler() as compile_pool,
        tqdm(total=sum(num_left.values()), unit="config", file=sys.stderr, disable=None) as progress,
    ):
        try:
            for shape in shapes:  # compiled in the background while others are timed
                compile_pool.submit(_variants(machine, shape, dtype, left[shape]))
            for shape in shapes:
                cost = estimate(num_left[shape])
                if not box.fits(cost + reserved(shape, shapes, num_left)):
                    result.left_out.append(shape)
                    continue
                progress.set_description(str(shape))
                started = box.elapsed
                record = records.open(shape, dtype, resume)
                result.records.append(record)
                if not _tune(machine, shape, dtype, left[shape], record, compile_pool, progress, box):
                    result.left_out.append(shape)
                _save(machine, records, shape.kernel, result)
                box.record(cost, box.elapsed - started)
                done += 1
        except (KeyboardInterrupt, RuntimeError):
            _save(machine, records, shape.kernel, result)
            where = "nothing could be saved" if result.unwritable else f"the results are in {result.path}"
            text = f"stopped after {done} of {len(shapes)} shapes; {where}; run the same command with --resume to continue"
            print(text, file=sys.stderr)
            raise
    return result


def _variants(machine: Machine, shape: TuningShape, dtype: str, configs: list[Config]) -> list[TuningVariant]:
    if machine.arch.name not in MULTIPROCESSORS:
        return []
    return [TuningVariant.of(machine.arch.name, shape.kernel, shape.part, dtype, config, every=True) for config in configs]


def _tune(
    machine: Machine,
    shape: TuningShape,
    dtype: str,
    configs: list[Config],
    record: SweepRecord,
    pool: Compiler,
    progress: tqdm,
    box: TimeBox,
) -> bool:
    """Times configs shortly, then some around the fastest, then the fastest at length. Returns whether the time sufficed."""
    problem = checker = None
    for is_second in (False, True):
        if is_second:
            fastest = [config for config, _ in record.by_time()]
            configs = [c for c in refinements(shape, machine.arch, fastest) if not record.knows(c)]
            progress.total += len(configs)
        variants = _variants(machine, shape, dtype, configs)
        pool.submit(variants)
        for index, config in enumerate(configs):
            if box.is_over:
                return False
            why = pool.failures(variants[index]) if variants else []
            if problem is None:
                problem = kernel_spec(shape.kernel).tuning_problem(shape, dtype, machine.device, reference)
                checker = Checker(problem, TORCH_DTYPES[dtype])
            try:
                wrong = "; ".join(why) or checker.error(config)
                if wrong:
                    record.rejected.append((config, wrong))
                else:
                    record.time(config, machine.quick(partial(problem.launch, config)))
            except Exception as error:  # compiler, driver and launch may raise anything: that is a finding
                record.rejected.append((config, f"{type(error).__name__}: {str(error).strip()[:200]}"))
                _check_device(machine.device, config)
            progress.update()
    if problem is None:  # all configs were timed by an earlier run
        return True
    heuristic = kernel_spec(shape.kernel).heuristic(shape, dtype, machine.arch)
    fastest = [config for config, _ in record.by_time()[:MAX_FINALISTS]]
    for config in [*fastest, *([heuristic] if record.has_time(heuristic) and heuristic not in fastest else [])]:
        if box.is_over:
            return False
        record.time(config, machine.bench(partial(problem.launch, config)))
    return True


def _check_device(device: torch.device, config: Config) -> None:
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except Exception as error:  # whatever its type, the device is lost
            raise RuntimeError(f"the device stopped responding after {config}; --resume skips this config: {error}") from error


def _save(machine: Machine, records: SweepRecords, kernel: str, result: SweepResult) -> None:
    """Saves records and table, and checks that a launch would find the new entries."""
    spec = kernel_spec(kernel)
    measured, timings_of = [], {}
    for record in (one for one in records.all if one.shape.kernel == kernel and one.timings):
        heuristic = spec.heuristic(record.shape, record.dtype, machine.arch)
        timings = [(heuristic | config, times) for config, times in record.timings]  # an older record may lack a field
        medians = [(config, times[0]) for config, times in timings]
        key = spec.config_key(record.shape, record.dtype)
        measured.append(MeasuredShape(kernel, key, heuristic, medians))
        timings_of[id(measured[-1])] = timings
    entries, expected = [], []
    for found, config in choose(measured, MARGIN):
        times = next(times for timed_config, times in timings_of[id(found)] if timed_config == config)
        usual = next((time for other, time in found.times if other == found.heuristic), None)
        config = _with_own_config(config, found)
        entry = {**found.key, "config": config} | dict(zip(("median_us", "p20_us", "p80_us"), times, strict=True))
        entries.append(entry if usual is None else {**entry, "heuristic_us": usual})
        expected.append((found, config))
    result.entries[kernel] = entries
    try:
        records.save()
        if entries:
            launch_config.save_entries(result.device, kernel, entries, result.path.parent)
    except OSError as error:
        if result.unwritable is None:
            text = f"{result.path} cannot be written: {error}; the sweep continues and prints its table at the end"
            print(text, file=sys.stderr)
        result.unwritable = error
        return
    for found, config in expected:
        used = launch_config.launch_config(kernel, machine.device, found.key, found.heuristic)
        if used != found.heuristic | config:
            raise RuntimeError(f"launches with {found.key} do not find {config} in {result.path}, but use {used}")


def _with_own_config(config: Config, found: MeasuredShape) -> Config:
    """If a library is fastest: its backend with the fastest config of the kernel, which impl="triton" then uses."""
    own = [(time, other) for other, time in found.times if other.get("backend", "triton") == "triton"]
    if config.get("backend", "triton") == "triton" or not own:
        return config
    return {**min(own, key=lambda pair: pair[0])[1], "backend": config["backend"]}


@contextmanager
def _tables_from(folder: Path) -> Iterator[None]:
    """Launches look up their configs in the folder of the sweep first."""
    try:
        with patch.dict(os.environ, KEYE_KERNELS_TILES=str(folder)):
            launch_config.clear_cache()
            yield
    finally:
        launch_config.clear_cache()
