"""Faults in the timed benchmarks: the profiler's events, the clock, the limit of time, the rows of `bench --gpu`."""

from ..fault import Fault

TIMING = "keye_kernels/tools/timing/"
PROFILING, CLOCK, GPU, ROWS = (f"{TIMING}{name}.py" for name in ("profiling", "clock", "gpu", "rows"))
FLOORS, TIME_BOX = f"{TIMING}floors.py", "keye_kernels/tools/time_box.py"
DEVICE, CONFIG = "keye_kernels/triton/device.py", "keye_kernels/triton/launch_config.py"

PROFILING_TESTS, CLOCK_TESTS, GPU_TESTS = (f"tests/tools/timing/test_{name}.py" for name in ("profiling", "clock", "gpu"))
SIBLING_TESTS = "tests/triton/test_sibling_tables.py"

FAULTS = [
    Fault(PROFILING, "total += max(0, end - reached)", "total += end - start", PROFILING_TESTS),
    Fault(PROFILING, "for start, end in sorted(intervals):", "for start, end in intervals:", PROFILING_TESTS),
    Fault(PROFILING, "reached = max(reached, end)", "reached = end", PROFILING_TESTS),
    Fault(PROFILING, "if on_gpu and is_annotation(event):", "if False:", PROFILING_TESTS),
    Fault(PROFILING, "if not is_copy(name))", ")", PROFILING_TESTS),
    Fault(PROFILING, "LAUNCH.match(event.name)", "LAUNCH.search(event.name)", PROFILING_TESTS),
    Fault(PROFILING, "|GraphLaunch\\w*)", ")", PROFILING_TESTS),
    Fault(CLOCK, "before.elapsed_time(after) / 1e3 / repeat", "before.elapsed_time(after) / 1e3", CLOCK_TESTS),
    Fault(CLOCK, "once * repeat, 1e-9", "once, 1e-9", CLOCK_TESTS),
    Fault(CLOCK, "        graph.replay()\n", "        call()\n", CLOCK_TESTS),
    Fault(FLOORS, "flops / (2 * PEAK_SIZE**2)", "flops / PEAK_SIZE**2", CLOCK_TESTS),
    Fault(TIME_BOX, "estimate * self.taken / self.estimated", "estimate", GPU_TESTS),
    Fault(TIME_BOX, "self.estimated += estimate", "self.estimated += taken", GPU_TESTS),
    Fault(GPU, "    box.record(row.seconds, box.elapsed - started)\n", "", GPU_TESTS),
    Fault(GPU, "None if floor is None else floor / median", "None if floor is None else median / floor", GPU_TESTS),
    Fault(GPU, "return int(bool(result.failed))", "return 0", GPU_TESTS),
    Fault(GPU, "if not math.isfinite(error):", "if False:", GPU_TESTS),
    Fault(GPU, "if row.only and impl not in row.only:", "if False:", GPU_TESTS),
    Fault(DEVICE, ' and " MIG " not in name', "", SIBLING_TESTS),
    Fault(CONFIG, '"." not in path.stem and path not in own', "path not in own", SIBLING_TESTS),
    Fault(CONFIG, "siblings.append((other[1] != chip[1], path))", "siblings.append((False, path))", SIBLING_TESTS),
    Fault(CONFIG, "return own + [path for _, path", "return [path for _, path", SIBLING_TESTS),
]
