"""Faults in the commands bench and compile: counts, limits, reports and packing."""

from ..fault import Fault

BENCH = "keye_kernels/tools/bench/"
COUNTED, COUNTING, CODE, FLOPS = (f"{BENCH}{name}.py" for name in ("counted", "counting", "machine_code", "flops"))
LOAD, PACKING, REPORT, RESULTS, TRAFFIC = (f"{BENCH}{name}.py" for name in ("load", "packing", "report", "results", "traffic"))
COMPILE = "keye_kernels/tools/compile.py"

COUNTED_TESTS = "tests/tools/bench/test_counted.py"
LIMITS = "tests/tools/bench/test_limits.py"
FLOPS_TESTS = "tests/tools/bench/test_flops.py"
PACKING_TESTS = "tests/tools/bench/test_packing.py"
LOAD_TESTS = "tests/tools/bench/test_load.py"
REPORT_TESTS = "tests/tools/bench/test_report.py"
PAGE = "tests/tools/bench/test_report_numbers.py"
TRAFFIC_TESTS = "tests/tools/bench/test_traffic.py"
OCCUPANCY = "tests/tools/test_occupancy.py"

FAULTS = [
    # Limits
    Fault(COUNTED, 'found["traffic"] + found["machine_code"])', 'found["traffic"])', COUNTED_TESTS),
    Fault(COUNTED, 'found["traffic"] + found["machine_code"])', 'found["machine_code"])', COUNTED_TESTS),
    Fault(COUNTED, "if targets:", "if True:", LIMITS),
    Fault(COUNTED, """'ABOVE ' if name in found['above'] else '<= '""", """'<= ' if name in found['above'] else 'ABOVE '""", COUNTED_TESTS),
    Fault(COUNTED, '''ratios = (f"{found['requested']:.3f}", f"{found['unique']:.3f}", multiplies)''', '''ratios = (f"{found['unique']:.3f}", f"{found['requested']:.3f}", multiplies)''', COUNTED_TESTS),
    Fault(f"{BENCH}__init__.py", "return int(exceeds_limits(found))", "return 0", COUNTED_TESTS),
    Fault(f"{BENCH}__init__.py", '[] if options.target == "none" else', "", LIMITS),
    Fault(f"{BENCH}__init__.py", "simulate(KeyeConfig(), options.devices, options.seed)", "simulate(KeyeConfig(), options.devices, 0)", LOAD_TESTS),
    Fault(f"{BENCH}__init__.py", "measure(options.requests, options.seed)", "measure(options.requests, 0)", LOAD_TESTS),
    Fault(f"{BENCH}__init__.py", "counted_work, options.force)", "counted_work, True)", REPORT_TESTS),
    Fault(f"{BENCH}__init__.py", "read_results(options.results, options.select)", "read_results(options.results)", REPORT_TESTS),
    Fault(COUNTING, "if row[key] > limit]", "if row[key] >= limit]", LIMITS),
    Fault(COUNTING, "if row[key] > limit]", "if row[key] > 1.1 * limit]", LIMITS),
    Fault(COUNTING, "tensor_bytes(*case.inputs, *case.written, *outputs)", "tensor_bytes(*case.inputs, *case.written)", COUNTED_TESTS),
    Fault(COUNTING, " + case.intermediate_bytes", "", COUNTED_TESTS),
    Fault(COUNTING, "case.limits if by == OURS else {}", "case.limits", LIMITS),
    Fault(COUNTING, "traffic.dot_flops / case.needed_flops", "case.needed_flops / traffic.dot_flops", LIMITS),
    Fault(COUNTING, "MAX_PEER_ERROR = 2e-2", "MAX_PEER_ERROR = 2e-1", LIMITS),
    Fault(COUNTING, "    if by != OURS:\n        _check_peer(by, case, outputs)\n", "", COUNTED_TESTS),
    Fault(COUNTING, '"_look_up", lambda *_: case.config) if case.config', '"_look_up", lambda *_: None) if case.config', LIMITS),
    Fault(CODE, '"sm_80": (11, 1.5), "sm_90": (9, 1.5)', '"sm_80": (11, 1.5), "sm_90": (11, 1.5)', LIMITS),
    Fault(CODE, '{"sm_80": (11, 1.5)', '{"sm_80": (110, 1.5)', LIMITS),
    Fault(CODE, '"sm_100": (9, 1.5)}', '"sm_100": (9, 15)}', LIMITS),
    Fault(CODE, "if row[name] > limit]", "if row[name] >= limit]", LIMITS),
    Fault(CODE, "MIN_WARPS_PER_MULTIPROCESSOR = 8", "MIN_WARPS_PER_MULTIPROCESSOR = 4", COUNTED_TESTS),
    Fault(CODE, 'row["blocks"] < 2 and', 'row["blocks"] < 1 and', COUNTED_TESTS),
    Fault(CODE, 'row["narrowest_access"] < MIN_ACCESS_BYTES', 'row["narrowest_access"] <= MIN_ACCESS_BYTES', LIMITS),
    Fault(CODE, "MIN_ACCESS_BYTES = 4", "MIN_ACCESS_BYTES = 2", COUNTED_TESTS),
    Fault(CODE, '"above": row["above"] + above(row)}', '"above": row["above"]}', COUNTED_TESTS),
    Fault(CODE, '"above": row["above"] + above(row)}', '"above": above(row)}', COUNTED_TESTS),
    Fault(CODE, 'analyse_loop(hot_loop(listing, "cuda") or listing)', "analyse_loop(listing)", LIMITS),
    Fault(CODE, "variant.scores_per_iteration / (32 * variant.num_warps)", "variant.scores_per_iteration / 32", COUNTED_TESTS),
    Fault(CODE, "WIDTH.search(op)) else 32)", "WIDTH.search(op)) else 128)", LIMITS),
    Fault(CODE, "min(bits) // 8", "max(bits) // 8", COUNTED_TESTS),
    Fault(CODE, "(?:IMAD|IADD", "(?:IADD", COUNTED_TESTS),
    Fault(CODE, "(?:LDG|STG|STS|LDGSTS)", "(?:LDG|STS|LDGSTS)", LIMITS),
    Fault(CODE, "if variant.in_bf16_forward", "if not variant.in_bf16_forward", LIMITS),
    # FLOPs
    Fault(FLOPS, "4 * width**2 + 2 * width", "3 * width**2 + 2 * width", FLOPS_TESTS),
    Fault(FLOPS, "2 * patches * (embedding + layers", "2 * patches * (layers", FLOPS_TESTS),
    Fault(FLOPS, "merged_width * (merged_width + config.hidden_size)", "merged_width * config.hidden_size", FLOPS_TESTS),
    Fault(FLOPS, "2 * heads + 2 * config.num_key_value_heads", "2 * heads + config.num_key_value_heads", FLOPS_TESTS),
    Fault(FLOPS, "3 * config.hidden_size * config.intermediate_size", "2 * config.hidden_size * config.intermediate_size", FLOPS_TESTS),
    Fault(FLOPS, "steps * (steps + 1) // 2", "steps * (steps - 1) // 2", FLOPS_TESTS),
    Fault(FLOPS, "prompt_tokens * (prompt_tokens + 1) // 2", "prompt_tokens * prompt_tokens // 2", FLOPS_TESTS),
    Fault(FLOPS, "config.vocab_size * new_tokens", "config.vocab_size", FLOPS_TESTS),
    Fault(FLOPS, "by_frame=edition_of(config.model_type).segment_by_frame", "by_frame=False", FLOPS_TESTS),
    Fault(FLOPS, "if prompt_tokens < max(merged, 1)", "if prompt_tokens <= max(merged, 1)", FLOPS_TESTS),
    # Traffic
    Fault(TRAFFIC, "launch.idle_programs += not self.has_stored", "pass", TRAFFIC_TESTS),
    Fault(TRAFFIC, "dot_flops += 2 * a.data.size", "dot_flops += a.data.size", TRAFFIC_TESTS),
    Fault(TRAFFIC, "pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]", "pointers.data.ravel()", TRAFFIC_TESTS),
    Fault(TRAFFIC, "for size, stride in zip(t.shape, t.stride(), strict=True) if stride)", "for size in t.shape)", TRAFFIC_TESTS),
    Fault(TRAFFIC, "launch.loaded_once + launch.stored_once", "launch.loaded_once", TRAFFIC_TESTS),
    Fault(TRAFFIC, "tree_leaves((args, kwargs, result))", "tree_leaves((args, kwargs))", TRAFFIC_TESTS),
    Fault(TRAFFIC, "not ours and not func.is_view and", "not ours and", TRAFFIC_TESTS),
    Fault(TRAFFIC, "starts[1:] > reached[:-1]", "starts[1:] > reached[:-1] + 1", TRAFFIC_TESTS),
    Fault(TRAFFIC, "np.maximum.accumulate(ends[order])", "ends[order]", TRAFFIC_TESTS),
    # Packing and load
    Fault(PACKING, "key=lambda index: -costs[index]", "key=lambda index: costs[index]", PACKING_TESTS),
    Fault(PACKING, "(load + costs[index], number)", "(load + 1, number)", PACKING_TESTS),
    Fault(PACKING, "max(loads) * len(loads) / sum(loads) - 1", "max(loads) / sum(loads) - 1", PACKING_TESTS),
    Fault(LOAD, "np.percentile(finished, (50, 95))", "np.percentile(finished, (50, 90))", LOAD_TESTS),
    Fault(LOAD, "finished += [end - start] * len(indices)", "finished += [end - begin] * len(indices)", LOAD_TESTS),
    Fault(LOAD, "padding=padded / prompt_slots", "padding=padded / tokens", LOAD_TESTS),
    Fault(LOAD, "imbalance_measured=imbalance(seconds)", "imbalance_measured=imbalance(finished)", LOAD_TESTS),
    Fault(LOAD, "t * h * w // 4 + MARKER_TOKENS", "t * h * w // 4", LOAD_TESTS),
    Fault(LOAD, '"share_of_ideal_throughput": 1 / relative_time', '"share_of_ideal_throughput": relative_time', LOAD_TESTS),
    Fault(LOAD, "sum(map(max, loads)) * devices / sum(costs)", "sum(map(max, loads)) * ROUNDS / sum(costs)", LOAD_TESTS),
    Fault(LOAD, "max(map(imbalance, loads))", "min(map(imbalance, loads))", LOAD_TESTS),
    Fault(LOAD, '"median": statistics.median(costs) / 1e12', '"median": statistics.mean(costs) / 1e12', LOAD_TESTS),
    Fault(LOAD, "tokens_per_second=tokens / total", "tokens_per_second=new_tokens / total", LOAD_TESTS),
    Fault(LOAD, "    run_batches(model, processor, requests, [[0]], pixels)  # warm-up\n", "", LOAD_TESTS),
    # The report
    Fault(REPORT, "timing.group, timing.seconds / before[timing.key].seconds)", "timing.group, before[timing.key].seconds / timing.seconds)", REPORT_TESTS),
    Fault(REPORT, "timing.group, base.seconds / timing.seconds)", "timing.group, timing.seconds / base.seconds)", REPORT_TESTS),
    Fault(REPORT, 'f"time in {other.file} / time in {one.file}"', 'f"time in {one.file} / time in {other.file}"', REPORT_TESTS),
    Fault(REPORT, "below 1 is faster.", "above 1 is faster.", REPORT_TESTS),
    Fault(REPORT, "and base is not timing", "", REPORT_TESTS),
    Fault(REPORT, 'timing.extra["roofline_share"])\n', '1 / timing.extra["roofline_share"])\n', PAGE),
    Fault(REPORT, "max(peak / 2**20, points.get(tokens, 0.0))", "peak / 2**20", PAGE),
    Fault(REPORT, "max(peak / 2**20, points.get(tokens, 0.0))", "max(peak / 1e6, points.get(tokens, 0.0))", PAGE),
    Fault(REPORT, 'f"{1e3 * timing.seconds:.3f}"', 'f"{1e6 * timing.seconds:.3f}"', PAGE),
    Fault(REPORT, "low, high = timing.quartiles", "high, low = timing.quartiles", PAGE),
    Fault(REPORT, '("gb_per_s", 1, ".3g")', '("tflop_per_s", 1, ".3g")', PAGE),
    Fault(REPORT, "[row[name] for row in rows], 0.4", '[row["unique"] for row in rows], 0.4', PAGE),
    Fault(REPORT, 'rows = counted_work["traffic"][::-1]', 'rows = counted_work["traffic"]', PAGE),
    Fault(REPORT, "if row[1] == group][::-1]", "if row[1] == group]", REPORT_TESTS),
    Fault(REPORT, "if path.exists() and not force:", "if path.exists() and force:", REPORT_TESTS),
    Fault(REPORT, "write_atomically(path, to_html(results, counted_work))", "path.write_text(to_html(results, counted_work))", "tests/tools/test_cli_errors.py::test_a_full_disk_leaves_no_half_written_page"),
    Fault(RESULTS, 'BASELINES = ("official (eager)", "reference", ', 'BASELINES = ("reference", "official (eager)", ', REPORT_TESTS),
    Fault(RESULTS, "if other.key[:3] == timing.key[:3]}", "if other.key[:2] == timing.key[:2]}", PAGE),
    Fault(RESULTS, "return self.group, self.shape, self.dtype, self.impl", 'return self.group, self.shape, "", self.impl', PAGE),
    Fault(RESULTS, 'if impl == "triton" and not gpu:', 'if impl == "triton":', PAGE),
    Fault(RESULTS, 'stats["median"], (stats["q1"], stats["q3"])', 'stats["q1"], (stats["q1"], stats["q3"])', PAGE),
    Fault(RESULTS, "first.keys() | second.keys()", "first.keys() & second.keys()", PAGE),
    Fault(RESULTS, "one.timings} ^ {timing.key for timing in other.timings}", "one.timings} - {timing.key for timing in other.timings}", PAGE),
    Fault(RESULTS, "(optional or value > 0)", "(optional or value >= 0)", REPORT_TESTS),
    # Machine code
    Fault(COMPILE, "RESERVED_SHARED_BYTES = 1 << 10", "RESERVED_SHARED_BYTES = 0", OCCUPANCY),
    Fault(COMPILE, "by_warp = -(-report.registers * 32 // 256) * 256", "by_warp = report.registers * 32", OCCUPANCY),
    Fault(COMPILE, "        multiprocessor.warps // warps,\n", "", OCCUPANCY),
    Fault(COMPILE, "        multiprocessor.blocks,\n        REGISTERS", "        REGISTERS", OCCUPANCY),
    Fault(COMPILE, "getattr(compiled.metadata, \"tmem_size\", 0) or 0, 1)", "1, 1)", OCCUPANCY),
    Fault(COMPILE, "compiled.asm[\"ptx\"])[1]) // 32", "compiled.asm[\"ptx\"])[1]) // 64", OCCUPANCY),
    Fault(COMPILE, "report.shared_bytes > (limit :=", "report.shared_bytes >= (limit :=", OCCUPANCY),
    Fault(COMPILE, "    elif not report.resident_blocks:", "    elif False:", OCCUPANCY),
    Fault(COMPILE, "if report.spills_in_loop:", "if report.stack_bytes:", OCCUPANCY),
    Fault(COMPILE, "VECTOR_REGISTERS // (-(-max(report.registers, 1) // 8) * 8)", "VECTOR_REGISTERS // max(report.registers, 1)", OCCUPANCY),
    Fault(COMPILE, "4 * by_simd // warps", "by_simd // warps", OCCUPANCY),
    Fault(COMPILE, "key=lambda body: (_count(TENSOR[vendor], body), len(body))", "key=len", OCCUPANCY),
    Fault(COMPILE, "if not any(a.start <= b.start and b.stop <= a.stop and a != b for b in loops)]", "]", OCCUPANCY),
    Fault(COMPILE, "listing[loop.start : loop.stop]) > 8]", "listing[loop.start : loop.stop]) > 0]", OCCUPANCY),
    Fault(COMPILE, "return 1 if failures else 0", "return 0", "tests/tools/test_compile.py"),
    Fault(COMPILE, 'options={"num_warps": variant.num_warps, "num_stages": variant.num_stages}', 'options={"num_warps": variant.num_warps}', OCCUPANCY),
    Fault(COMPILE, 'attributes[(position,)] = [["tt.divisibility", 16]]', "pass", OCCUPANCY),
]  # fmt: skip
