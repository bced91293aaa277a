"""What autotune decides at its limits: shared memory, errors, margins, records of other dtypes and versions, timing."""

import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from keye_kernels.cli import main
from keye_kernels.tools.autotune import candidates as planning
from keye_kernels.tools.autotune import dryrun, pruning, records
from keye_kernels.tools.autotune import sweep as sweeping
from keye_kernels.tools.autotune.checking import Checker
from keye_kernels.tools.autotune.choosing import choose
from keye_kernels.tools.autotune.pruning import Compiler, TuningVariant
from keye_kernels.tools.autotune.records import SweepRecords
from keye_kernels.tools.autotune.workloads import load_shapes
from keye_kernels.tools.compile import Report
from keye_kernels.triton.device import MULTIPROCESSORS, Arch
from keye_kernels.triton.launch_config import table_path
from keye_kernels.triton.registry import kernel_spec
from keye_kernels.triton.spec import TuningProblem, TuningShape

from .test_planning import chosen, measured
from .test_sweep import LARGE, NAME, SMALL, stub, used  # noqa: F401 - stub is a fixture

H100 = Arch("sm_90")


@pytest.mark.parametrize("kernel, part", [("linear", "linear_1"), ("varlen_attention", "vision")])
def test_a_config_may_use_all_shared_memory_and_the_heuristic_is_always_tried(kernel, part, monkeypatch):
    shape, spec = TuningShape(kernel, part, 1, 1024), kernel_spec(kernel)
    limit = MULTIPROCESSORS["sm_90"].shared_bytes_per_block
    first = spec.heuristic(shape, "bf16", H100)
    monkeypatch.setattr(spec, "refinements", lambda config: [{"num_stages": 1}])
    for needed, fits in ((limit, True), (limit + 1, False)):
        monkeypatch.setattr(spec, "shared_bytes", lambda *_, needed=needed: needed)
        tried = planning.candidates(shape, "bf16", H100)
        own = [config for config in tried if config["backend"] == "triton" and config != first]
        assert tried[0] == first and bool(own) == fits
        assert bool(planning.refinements(shape, H100, [{**first, "backend": "triton"}])) == fits


def problem(outputs, expected, rows=None):
    """A problem whose launch returns `outputs`; `expected` are the exact outputs, which rounding to float16 does not change."""
    rows = torch.arange(len(expected[0])) if rows is None else rows
    return TuningProblem(lambda config: outputs, lambda dtype: tuple(x.to(dtype) for x in expected), rows)


@pytest.mark.parametrize("error, is_right", [(0.0, True), (1.9, True), (2.0, True), (2.1, False)])
def test_an_error_of_two_eps_of_the_largest_value_is_allowed(error, is_right):
    exact = torch.tensor([0.0, -8.0, 4.0])
    eps = torch.finfo(torch.float16).eps
    for index in range(3):
        wrong = exact.clone()
        wrong[index] += error * 8.0 * eps
        found = Checker(problem((wrong,), (exact,)), torch.float16).error({})
        assert (found is None) == is_right, index
        # Any output may be wrong
        pair = Checker(problem((exact, wrong), (exact, exact)), torch.float16)
        assert (pair.error({}) is None) == is_right


def test_twice_the_error_of_the_reference_is_allowed():
    exact = torch.tensor([1.0, 0.0])

    def expect(dtype):
        return (exact if dtype == torch.float32 else exact.to(dtype) + torch.tensor([0.0, 0.25], dtype=dtype),)

    for error, is_right in ((0.5, True), (0.51, False)):
        wrong = exact + torch.tensor([0.0, error])
        checker = Checker(TuningProblem(lambda config, wrong=wrong: (wrong,), expect, torch.arange(2)), torch.float16)
        assert (checker.error({}) is None) == is_right


def test_only_the_rows_with_a_known_result_are_compared():
    outputs, rows = torch.tensor([[9.0], [1.0], [9.0], [2.0]]), torch.tensor([1, 3])
    assert Checker(problem((outputs,), (torch.tensor([[1.0], [2.0]]),), rows), torch.float16).error({}) is None
    assert Checker(problem((outputs,), (torch.tensor([[1.0], [9.0]]),), rows), torch.float16).error({})


@pytest.mark.parametrize("fails", [False, True])
def test_checking_leaves_the_settings_of_torch_as_they_were(fails):
    def launch(config):
        assert torch.empty(3).isnan().all()
        if fails:
            raise RuntimeError("no launch")
        return (torch.zeros(1),)

    checker = Checker(TuningProblem(launch, lambda dtype: (torch.zeros(1, dtype=dtype),), torch.arange(1)), torch.float16)
    fills = torch.utils.deterministic.fill_uninitialized_memory
    if fails:
        with pytest.raises(RuntimeError, match="no launch"):
            checker.error({})
    else:
        assert checker.error({}) is None
    assert not torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory == fills


def test_the_margin_is_relative_to_one_shape_and_not_to_their_sum():
    assert chosen([measured(1, {"a": 100, "b": 97}), measured(1, {"a": 100, "b": 97})]) == {1: (128, 1)}
    assert chosen([measured(1, {"a": 100, "b": 94}), measured(1, {"a": 100, "b": 94})]) == {1: (128, 2)}


def test_a_gain_of_exactly_the_margin_keeps_the_heuristic():
    assert chosen([measured(1, {"a": 1.0, "b": 0.5})], margin=0.5) == {1: (128, 1)}
    assert chosen([measured(1, {"a": 1.0, "b": 0.4999})], margin=0.5) == {1: (128, 2)}


def test_a_config_that_fails_for_one_shape_of_a_key_is_not_chosen():
    for shapes in ([{"a": 100, "b": 10}, {"a": 100}], [{"a": 100}, {"a": 100, "b": 10}]):
        assert chosen([measured(1, times) for times in shapes]) == {1: (128, 1)}


def test_the_shared_field_is_the_one_with_the_smallest_sum_over_all_buckets():
    # 64 wins in the first bucket, 128 by far in the second one; the heuristic's 128 is not the default here
    shapes = [
        measured(1, {"c": 50, "b": 100}, "c", "varlen_attention"),
        measured(2, {"c": 100, "b": 10}, "c", "varlen_attention"),
    ]
    found = {shape.key["tokens"]: config["BLOCK_N"] for shape, config in choose(shapes, 0.05)}
    assert found == {1: 128, 2: 128}
    found = {shape.key["tokens"]: config["BLOCK_N"] for shape, config in choose(shapes[::-1], 0.05)}
    assert found == {1: 128, 2: 128}


def timed(folder, versions=None):
    records_ = SweepRecords(NAME, folder)
    record = records_.open(SMALL, "bf16", resume=False)
    record.timings.append(({"BLOCK_T": 1}, [1.0, 2.0, 3.0]))
    record.rejected.append(({"BLOCK_T": 2}, "spills"))
    records_.save()
    if versions:
        content = json.loads(records_.path.read_text())
        assert versions.keys() <= content["versions"].keys()
        content["versions"] |= versions
        records_.path.write_text(json.dumps(content))


def test_a_saved_record_is_resumed_for_its_shape_and_dtype_only(tmp_path):
    timed(tmp_path)
    found = SweepRecords(NAME, tmp_path)
    record = found.open(SMALL, "bf16", resume=True)
    assert record.knows({"BLOCK_T": 1}) and record.knows({"BLOCK_T": 2}) and not record.knows({"BLOCK_T": 3})
    assert (record.timings, record.rejected) == ([({"BLOCK_T": 1}, [1.0, 2.0, 3.0])], [({"BLOCK_T": 2}, "spills")])
    for shape, dtype in ((SMALL, "fp16"), (LARGE, "bf16")):
        assert found.open(shape, dtype, resume=True).timings == []
    assert len(found.all) == 3


def test_without_resume_a_record_replaces_the_saved_one(tmp_path):
    timed(tmp_path)
    found = SweepRecords(NAME, tmp_path)
    assert found.open(SMALL, "bf16", resume=False).timings == [] and len(found.all) == 1


@pytest.mark.parametrize("name", ["keye_kernels", "torch", "triton"])
def test_records_of_another_version_of_any_package_are_dropped(name, tmp_path):
    timed(tmp_path, {name: "0.0.1"})
    assert SweepRecords(NAME, tmp_path).all == []


def test_records_are_written_atomically(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(records, "write_atomically", lambda path, text: written.append((path, json.loads(text))))
    timed(tmp_path)
    [(path, content)] = written
    assert path == table_path(f"{NAME}.sweep", tmp_path) and content["device"] == NAME and len(content["records"]) == 1


def test_the_choice_uses_medians_and_a_margin_of_two_percent(stub, tmp_path, monkeypatch):  # noqa: F811
    stub.microseconds |= {1: 98.5}
    stub.sweep(tmp_path / "a")
    assert used(tmp_path / "a", monkeypatch) == stub.tried[0]
    stub.microseconds |= {1: 97.5, 2: 97.9}
    monkeypatch.setattr(stub, "bench", lambda run, bench=stub.bench: quick_twentieth(bench(run), stub.launched))
    stub.sweep(tmp_path / "b")
    assert used(tmp_path / "b", monkeypatch) == stub.tried[1]


def quick_twentieth(times, number):
    """Config 2 is the fastest in a fifth of the runs, but not in the median."""
    median, _, slow = times
    return [median, 0.1 * median if number == 2 else 0.9 * median, slow]


def test_all_variants_of_a_config_are_compiled_before_it_is_timed(stub, tmp_path, monkeypatch):  # noqa: F811
    submitted = []
    monkeypatch.setattr(stub, "submit", submitted.extend)
    stub.sweep(tmp_path)
    assert {(v.target, v.kernel, v.part, v.dtype, v.every) for v in submitted} == {("sm_90", "rope", "vision", "fp16", True)}
    assert {v.config for v in submitted} == {tuple(sorted(config.items())) for config in stub.tried}


def test_records_of_other_kernels_stay_out_of_a_table(stub, tmp_path):  # noqa: F811
    shape = TuningShape("position_embedding_2d", "vision", 1, 64)
    found = SweepRecords(NAME, tmp_path)
    found.open(shape, "fp16", False).timings.append((kernel_spec(shape.kernel).heuristic(shape, "fp16", H100), [1.0, 1.0, 1.0]))
    found.save()
    result = stub.sweep(tmp_path)
    assert list(result.entries) == ["rope"] and len(result.entries["rope"]) == 1


def test_the_fastest_configs_are_timed_with_do_bench(monkeypatch):
    from triton import testing

    calls = []
    monkeypatch.setattr(testing, "do_bench", lambda run, **options: calls.append(options) or [1.0, 0.0, 2.0])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(sweeping, "device_arch", lambda device: H100)
    monkeypatch.setattr(sweeping, "quick_timer", lambda device: f"quick timer of {device}")
    monkeypatch.setattr(sweeping.os, "cpu_count", lambda: 2)
    machine = sweeping.on_this_gpu()
    assert machine.device == torch.device("cuda", 3) and machine.arch is H100 and machine.compiler.args == (1,)
    assert machine.bench(print) == [1.0, 0.0, 2.0] and machine.quick == "quick timer of cuda:3"
    assert calls == [{"warmup": 10, "rep": 50, "quantiles": [0.5, 0.2, 0.8]}]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], ("bf16", None, False, 225)),
        (["--dtype", "fp16", "--resume"], ("fp16", "x", True, 225)),
        (["--minutes", "0.5"], ("bf16", None, False, 30)),
        (["--minutes", "inf"], ("bf16", None, False, float("inf"))),
    ],
)
def test_the_options_of_the_command_reach_the_sweep(arguments, expected, monkeypatch, tmp_path, capsys):
    calls = []
    folder = ["--save-dir", str(tmp_path)] if expected[1] else []
    result = sweeping.SweepResult(NAME, tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sweeping, "on_this_gpu", lambda: "this GPU")
    monkeypatch.setattr(sweeping, "sweep", lambda *given: calls.append(given) or result)
    assert main(["autotune", "--shapes", "small", "--kernel", "rope", *arguments, *folder]) == 0
    dtype, saved, resume, seconds = expected
    [(*given, box)] = calls
    assert given == ["this GPU", load_shapes("small", ("rope",)), dtype, str(tmp_path) if saved else None, resume]
    assert box.seconds == seconds


@pytest.mark.parametrize("minutes", ["0", "-1", "nan"])
def test_the_limit_of_time_must_be_positive(minutes, capsys):
    assert main(["autotune", "--minutes", minutes]) == 2
    assert f"--minutes must be a positive number, got {float(minutes):g}" in capsys.readouterr().err


def test_a_dry_run_has_no_limit_of_time(capsys):
    assert main(["autotune", "--dry-run", "--target", "sm_90", "--minutes", "1"]) == 2
    assert "--minutes needs a run that times" in capsys.readouterr().err


def test_the_options_of_a_dry_run_reach_it(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(dryrun, "dry_run", lambda *given: calls.append(given) or (["a line"], True))
    assert main(["autotune", "--dry-run", "--target", "sm_90,sm_80,sm_90", "--dtype", "fp16", "--kernel", "rope"]) == 0
    assert calls == [(["sm_90", "sm_80"], load_shapes("keye-8b", ("rope",)), "fp16")]
    assert capsys.readouterr().out == "compiled ahead of time, nothing was timed\na line\n"


def variant(every=False):
    return TuningVariant.of("sm_90", "rope", "text", "bf16", {"BLOCK_T": 1}, every)


class Executor:
    """Runs nothing and counts what was submitted."""

    def __init__(self, reports):
        self.reports, self.count = reports, 0

    def submit(self, function, given):
        self.count += 1
        return SimpleNamespace(result=lambda: self.reports)


def test_a_variant_is_compiled_once_and_all_of_its_reports_count():
    good, bad = Report("sm_90", "rope", "a"), Report("sm_90", "rope", "b", failures=["spills", "too large"])
    executor = Executor([good, bad])
    pool = Compiler(executor)
    pool.submit([variant(), variant()])
    assert pool.failures(variant()) == ["spills", "too large"] and pool.reports(variant()) == [good, bad]
    assert executor.count == 1
    pool.submit([variant(every=True)])
    assert executor.count == 2


@pytest.mark.parametrize("every, expected", [(False, ["a"]), (True, ["a", "b"])])
def test_every_specialization_or_the_most_common_one_is_compiled(every, expected, monkeypatch):
    monkeypatch.setattr("keye_kernels.tools.compile.check", lambda target, kernel, one: one)
    monkeypatch.setattr(pruning, "kernel_spec", lambda name: SimpleNamespace(variants=lambda *_: ["a", "b"]))
    assert pruning.compile_variant(variant(every)) == expected


@pytest.mark.parametrize(
    ("reports", "text"),
    [
        ([], "runs a library"),
        ([Report("sm_90", "k", "v", registers=40, stack_bytes=8, shared_bytes=96)],
         "40 registers, 8 bytes spilled, 96 bytes of shared memory"),
        ([Report("sm_90", "k", "v", failures=["spills", "too large"])], "rejected: spills; too large"),
    ],
)  # fmt: skip
def test_a_line_of_the_dry_run(reports, text):
    assert dryrun._resources(variant(), Compiler(Executor(reports))) == text


def test_sizes_with_the_same_power_of_two_above_them_are_one_shape(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"decode": [1, 2, 3, 4, 5, 8, 9]}))
    sizes = [shape.total for shape in load_shapes(str(path), ("rope",))]
    assert sizes == [1, 2, 3, 5, 9]
    keys = [kernel_spec("rope").config_key(TuningShape("rope", "text", 1, size), "bf16") for size in sizes]
    assert [2 ** math.ceil(math.log2(n)) for n in sizes] == [key["tokens"] for key in keys]


@pytest.mark.parametrize("failing, expected", [((), 0), (("rope",), 1), (("rope", "position_embedding_2d"), 1)])
def test_a_dry_run_fails_if_no_config_of_a_kernel_compiles(failing, expected, monkeypatch, capsys):
    """As with a folder of Triton's cache that cannot be written."""

    class Pool:
        def submit(self, variants):
            pass

        def reports(self, one):
            failures = ["FileNotFoundError: '/read-only'"] if one.kernel in failing else []
            return [Report("sm_90", one.kernel, "v", registers=40, stack_bytes=0, shared_bytes=0, failures=failures)]

    monkeypatch.setattr(dryrun, "compiler", lambda workers: nullcontext(Pool()))
    arguments = ["autotune", "--dry-run", "--target", "sm_90", "--kernel", "rope,position_embedding_2d"]
    assert main(arguments) == expected
    assert ("rejected: FileNotFoundError" in capsys.readouterr().out) == bool(failing)
