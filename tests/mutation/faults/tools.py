"""Faults in the command line and in the commands generate, inspect, demo, verify and doctor."""

from ..fault import Fault

TOOLS = "keye_kernels/tools/"
CLI, GENERATE, INSPECT, DEMO, RUNNING = (
    "keye_kernels/cli.py",
    *(f"{TOOLS}{n}.py" for n in ("generate", "inspect", "demo", "running")),
)
VERIFY, CHECKS, ANSWERS = (f"{TOOLS}verify/{name}.py" for name in ("__init__", "checks", "answers"))
DOCTOR, MACHINE, VERSIONS = (f"{TOOLS}doctor/{name}.py" for name in ("__init__", "machine", "versions"))

OPTIONS = "tests/tools/test_options.py"
ERRORS = "tests/tools/test_cli_errors.py::test_a_bad_input_prints_one_line_and_exits_with_2"
VERIFY_TESTS = "tests/tools/test_verify.py"
VERIFY_FAULTS = "tests/tools/test_verify_faults.py"
VERIFY_RUNS = "tests/tools/test_verify_runs.py"
DOCTOR_TESTS = "tests/tools/test_doctor.py"
CONCLUSIONS = "tests/tools/test_doctor_conclusions.py"

FAULTS = [
    # Options
    Fault(CLI, "type=int, default=128, metavar", "type=int, default=16, metavar", OPTIONS),
    Fault(CLI, '"--seeds", type=int, default=2', '"--seeds", type=int, default=1', OPTIONS),
    Fault(CLI, 'choices=tuple(EDITIONS), default="preview"', 'choices=tuple(EDITIONS), default="1.5"', OPTIONS),
    Fault(CLI, '"--impl", default="auto"', '"--impl", default="reference"', OPTIONS),
    Fault(GENERATE, '{} if options.fps is None else {"fps": options.fps}', "{}", OPTIONS),
    Fault(GENERATE, "thinking=options.thinking", "thinking=None", OPTIONS),
    Fault(GENERATE, "min_pixels=options.min_pixels, ", "min_pixels=None, ", OPTIONS),
    Fault(GENERATE, "dtype=options.dtype,", "dtype=None,", OPTIONS),
    Fault(GENERATE, "device=device,", "device=None,", OPTIONS),
    Fault(GENERATE, "impl=options.impl,", 'impl="auto",', OPTIONS),
    Fault(GENERATE, "do_sample=options.sample,", "do_sample=False,", OPTIONS),
    Fault(GENERATE, "else None for name in SAMPLING_OPTIONS}", "else None for name in SAMPLING_OPTIONS[1:]}", OPTIONS),
    Fault(GENERATE, '"top_k", "top_p", "seed")', '"top_p", "seed")', OPTIONS),
    Fault(GENERATE, '("temperature", "top_k", "top_p",', '("temperature", "top_k",', OPTIONS),
    Fault(GENERATE, "getattr(options, name) if options.sample", "getattr(options, name) or None if options.sample", OPTIONS),
    Fault(GENERATE, "0 <= options.seed < 2**63", "0 < options.seed < 2**63", OPTIONS),
    Fault(GENERATE, "if getattr(options, name) is not None]", "if getattr(options, name)]", OPTIONS),
    Fault(GENERATE, "processor.decode(new_ids, skip_special_tokens=True)", "processor.decode(new_ids)", OPTIONS),
    Fault(GENERATE, "tokens[0, prompt_tokens:]", "tokens[0, prompt_tokens - 1 :]", OPTIONS),
    Fault(INSPECT, '{} if options.fps is None else {"fps": options.fps}', "{}", OPTIONS),
    Fault(INSPECT, "inspect_video(options.video, options.edition, video_options)", 'inspect_video(options.video, "preview", video_options)', OPTIONS),
    Fault(INSPECT, "options.context or EDITIONS[options.edition]", 'options.context or EDITIONS["preview"]', OPTIONS),
    Fault(INSPECT, "options.context or EDITIONS[options.edition].context_length", "EDITIONS[options.edition].context_length", OPTIONS),
    Fault(INSPECT, "options.context < 1", "options.context <= 1", OPTIONS),
    Fault(DEMO, "device=device, impl=options.impl)", "device=device)", OPTIONS),
    Fault(DEMO, 'options.dtype or ("float32" if is_interpreted else None)', "options.dtype", OPTIONS),
    Fault(DEMO, 'options.dtype or ("float32" if is_interpreted else None)', '"float32" if is_interpreted else None', OPTIONS),
    Fault(DEMO, "is_right.append(answer == expected)", "is_right.append(bool(answer))", OPTIONS),
    Fault(DEMO, "first, *later = timer.times[1:]", "first, *later = timer.times", OPTIONS),
    Fault(RUNNING, "return run() or 0", "run()\n        return 0", VERIFY_TESTS),
    Fault(RUNNING, "EXIT_UNEXPECTED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130", "EXIT_UNEXPECTED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 1, 130", ERRORS),
    # verify
    Fault(VERIFY, "RUNS = 10 ", "RUNS = 1 ", VERIFY_RUNS),
    Fault(VERIFY, "INTERPRETER_RUNS = 2", "INTERPRETER_RUNS = 1", VERIFY_RUNS),
    Fault(VERIFY, 'Setup(device, "triton", True, every, RUNS, [])', 'Setup(device, "triton", False, every, RUNS, [])', VERIFY_RUNS),
    Fault(VERIFY, 'Setup(device, "triton", True, every, RUNS, [])', 'Setup(device, "triton", True, every[:2], RUNS, [])', VERIFY_RUNS),
    Fault(VERIFY, "False, every[:2], INTERPRETER_RUNS", "False, every[:1], INTERPRETER_RUNS", VERIFY_RUNS),
    Fault(VERIFY, "RUNS if on_gpu else INTERPRETER_RUNS", "INTERPRETER_RUNS", VERIFY_RUNS),
    Fault(VERIFY, "setup.device, impl, seeds, setup.runs)", "setup.device, impl, 1, setup.runs)", VERIFY_RUNS),
    Fault(VERIFY, "setup.device, impl, seeds, setup.runs)", "setup.device, impl, seeds, 1)", VERIFY_RUNS),
    Fault(VERIFY, "verify_cases(setup.real_sizes, run_reference)", "verify_cases(False, run_reference)", VERIFY_RUNS),
    Fault(VERIFY, "check_answers(setup.device, setup.impl)", 'check_answers(setup.device, "reference")', VERIFY_RUNS),
    Fault(VERIFY, "passed, seconds = all(", "passed, seconds = any(", VERIFY_TESTS),
    Fault(VERIFY, "return 0 if passed else 1", "return 0", VERIFY_TESTS),
    Fault(VERIFY, "return 1 if failed else 0", "return 0", VERIFY_TESTS),
    Fault(VERIFY, "results = verify(setup, seeds=options.seeds)", "results = verify(setup)", VERIFY_RUNS),
    Fault(VERIFY, "verify(setup, seeds=options.seeds, report", "verify(setup, report", VERIFY_RUNS),
    Fault(VERIFY, "{result.runs - result.runs_that_differ}/", "{result.runs_that_differ}/", VERIFY_RUNS),
    Fault(CHECKS, "torch.Generator().manual_seed(seed)", "torch.Generator().manual_seed(0)", VERIFY_RUNS),
    Fault(CHECKS, "worst = max(worst, element, key=_share)", "worst = element", VERIFY_RUNS),
    Fault(CHECKS, "for _ in range(runs - 1))", "for _ in range(runs - 2))", VERIFY_TESTS),
    Fault(CHECKS, "for _ in range(runs - 1))", "for _ in range(1))", VERIFY_RUNS),
    Fault(CHECKS, "self.error <= self.allowed and not", "self.error <= 10 * self.allowed and not", VERIFY_FAULTS),
    Fault(CHECKS, "and not self.runs_that_differ and", "and", VERIFY_TESTS),
    Fault(CHECKS, ".abs().nan_to_num(nan=torch.inf)", ".abs().nan_to_num(nan=0.0)", VERIFY_RUNS),
    Fault(CHECKS, "found = max(found, (float(error[at]), float(allowed.flatten()[at])), key=_share)", "found = float(error[at]), float(allowed.flatten()[at])", VERIFY_RUNS),
    Fault(CHECKS, "int((error / allowed.flatten()).argmax())", "int(error.argmax())", VERIFY_RUNS),
    Fault(CHECKS, "guards.extend((buffer[:GUARD_ROWS], buffer[-GUARD_ROWS:]))", "guards.append(buffer[-GUARD_ROWS:])", VERIFY_RUNS),
    Fault(CHECKS, '(torch, "empty_like"), (torch.Tensor, "new_empty")', '(torch, "empty_like")', VERIFY_RUNS),
    Fault(CHECKS, '(torch, "empty_like"), (torch.Tensor, "new_empty")', '(torch.Tensor, "new_empty")', VERIFY_RUNS),
    Fault(CHECKS, "GUARD_COLUMNS if name in STRIDED else 0", "0", VERIFY_TESTS),
    Fault(CHECKS, "truth if element[0] <= element[1] else None", "truth", VERIFY_RUNS),
    Fault(CHECKS, 'FLOAT32_ARGUMENTS = ("inv_freq",)', "FLOAT32_ARGUMENTS = ()", VERIFY_RUNS),
    Fault(ANSWERS, "float(max(differ, answer != right))", "float(differ)", VERIFY_FAULTS),
    Fault(ANSWERS, "float(max(differ, answer != right))", "float(answer != right)", VERIFY_RUNS),
    Fault(ANSWERS, 'for name in (impl, "reference")]', "for name in (impl, impl)]", VERIFY_RUNS),
    Fault(ANSWERS, "abs(len(tokens) - len(expected)) + ", "", VERIFY_RUNS),
    # doctor
    Fault(DOCTOR, "return 1 if found.problems else 0", "return 0", DOCTOR_TESTS),
    Fault(DOCTOR, 'version_problems(packages, pinned, kind == "cpu")', "version_problems(packages, pinned)", CONCLUSIONS),
    Fault(DOCTOR, "version_problems(packages, pinned, ", "version_problems(packages, None, ", CONCLUSIONS),
    Fault(DOCTOR, 'right = test["operators"] - len(test["failed"])', 'right = test["operators"]', CONCLUSIONS),
    Fault(DOCTOR, "        found.problems += problems\n", "        found.problems = problems\n", CONCLUSIONS),
    Fault(DOCTOR, "for number, problem in enumerate(found.problems, 1):", "for number, problem in enumerate(found.problems[:1], 1):", CONCLUSIONS),
    Fault(MACHINE, "capability < MIN_CAPABILITY", "capability <= MIN_CAPABILITY", CONCLUSIONS),
    Fault(MACHINE, "if not is_amd and capability", "if capability", CONCLUSIONS),
    Fault(MACHINE, "bool(torch.version.hip))", "False)", CONCLUSIONS),
    Fault(MACHINE, 'any(map(shutil.which, ("cc", "gcc", "clang")))', 'all(map(shutil.which, ("cc", "gcc", "clang")))', CONCLUSIONS),
    Fault(MACHINE, '"free_gib": round(free / 2**30, 1)', '"free_gib": round(total / 2**30, 1)', CONCLUSIONS),
    Fault(MACHINE, "if driver is None:\n            return found, []", "if driver is None or torch.version.cuda is None:\n            return found, []", DOCTOR_TESTS),
    Fault(MACHINE, "except Exception as error:\n        return found, [Problem(", "except RuntimeError as error:\n        return found, [Problem(", CONCLUSIONS),
    Fault(MACHINE, "if requested and requested == impl:", "if requested:", CONCLUSIONS),
    Fault(MACHINE, '"there is no GPU" if device_type == "cpu" else "Triton is not installed"', '"Triton is not installed"', CONCLUSIONS),
    Fault(MACHINE, "except FileNotFoundError:\n            continue", 'except FileNotFoundError:\n            return {"table": None, "note": "no table"}', CONCLUSIONS),
    Fault(MACHINE, "impl, 1, 2) for case", "impl, 1, 1) for case", CONCLUSIONS),
    Fault(MACHINE, "if not result.passed]", "if result.error > result.allowed]", CONCLUSIONS),
    Fault(VERSIONS, "numbers(shown[name]) < numbers(limit)", "numbers(shown[name]) <= numbers(limit)", CONCLUSIONS),
    Fault(VERSIONS, "numbers(shown[name]) >= numbers(limit)", "numbers(shown[name]) > numbers(limit)", CONCLUSIONS),
    Fault(VERSIONS, "numbers(triton)[:2] != numbers(pinned_triton)[:2]", "numbers(triton) != numbers(pinned_triton)", CONCLUSIONS),
    Fault(VERSIONS, '(interprets and below("triton", "3.7")', '(below("triton", "3.7")', CONCLUSIONS),
    Fault(VERSIONS, 're.split(r"[+a-zA-Z-]", text)[0]', "text", CONCLUSIONS),
    Fault(VERSIONS, "version=pinned_triton or package.version", "version=package.version", CONCLUSIONS),
    Fault(VERSIONS, "return next((pin[1] for pin in pins if pin), None)", "return pins[0][1] if pins and pins[0] else None", CONCLUSIONS),
    Fault(VERSIONS, '(shown["vllm"] is not None and at_least("transformers", "5.20"),', '(at_least("transformers", "5.20"),', DOCTOR_TESTS),
    Fault(VERSIONS, 'RANGE_CHECKED = ("torch", "triton", "numpy", "transformers", "flash_attn", "vllm")\nREQUIRED = ("numpy", ', 'RANGE_CHECKED = ("torch", "triton", "numpy", "transformers", "flash_attn", "vllm")\nREQUIRED = (', CONCLUSIONS),
    Fault(VERSIONS, '*map(too_old, ("torch", "numpy", "flash_attn", "vllm"))', '*map(too_old, ("torch", "numpy", "vllm"))', CONCLUSIONS),
]  # fmt: skip
