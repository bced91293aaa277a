"""The whole sweep with a stub timer, a stub compiler and a stub device name."""

import json
import logging
from contextlib import contextmanager

import pytest
import torch

from keye_kernels import reference
from keye_kernels.cli import main
from keye_kernels.tools.autotune import plan
from keye_kernels.tools.autotune import sweep as sweeping
from keye_kernels.tools.autotune.candidates import candidates, refinements
from keye_kernels.tools.autotune.checking import Checker
from keye_kernels.tools.autotune.command import DEFAULT_MINUTES
from keye_kernels.tools.autotune.workloads import load_shapes
from keye_kernels.tools.time_box import TRUSTED_SECONDS, TimeBox
from keye_kernels.triton import launch_config, linear_spec, patch_merge_norm_spec, position_embedding_2d_spec
from keye_kernels.triton.device import Arch
from keye_kernels.triton.registry import kernel_names, kernel_spec
from keye_kernels.triton.spec import TuningProblem, TuningShape

CPU = torch.device("cpu")
NAME = "NVIDIA Stub 9000"
H100 = Arch("sm_90")
SMALL, LARGE = TuningShape("rope", "vision", 1, 16), TuningShape("rope", "vision", 1, 4096)


class Stub:
    """A GPU whose launches copy a tensor. Each candidate, by its number, can be slow, wrong or broken."""

    def __init__(self):
        self.tried = candidates(SMALL, "fp16", H100)
        self.microseconds = dict.fromkeys(range(len(self.tried)), 100.0)
        self.bad, self.benched, self.finalists, self.launched, self.stop_after = {}, [], [], None, None
        self.clock, self.seconds = 0.0, 0.0  # each short run takes `seconds`

    def number(self, config):
        return self.tried.index(config)

    def failures(self, variant):
        return ["spills inside a loop"] if self.bad.get(self.number(dict(variant.config))) == "spills" else []

    def submit(self, variants): ...

    def problem(self, shape, dtype, device, reference):
        x = torch.arange(8.0)

        def launch(config):
            self.launched = self.number(config)
            kind = self.bad.get(self.launched)
            if kind == "raises":
                raise RuntimeError("out of resource: shared memory")
            memory = torch.empty(8, dtype=torch.float16)
            if kind == "unwritten" and memory.isnan().all():
                return (memory,)
            return ((x + (kind == "wrong")).half(),)  # reused memory may already hold the correct result

        return TuningProblem(launch, lambda dtype: (x.to(dtype),), torch.arange(8))

    def quick(self, run):
        if self.stop_after == len(self.benched):
            raise KeyboardInterrupt
        run()
        self.benched.append(self.launched)
        self.clock += self.seconds
        return [self.microseconds[self.launched] / 1000] * 3

    def bench(self, run):
        run()
        self.finalists.append(self.launched)
        time = self.microseconds[self.launched] / 1000
        return [time, 0.9 * time, 1.1 * time]

    def sweep(self, folder, shapes=(SMALL,), resume=False, limit=None):
        @contextmanager
        def compiler():
            yield self

        machine = sweeping.Machine(CPU, H100, self.quick, self.bench, compiler)
        return sweeping.sweep(machine, list(shapes), "fp16", folder, resume, TimeBox(limit, lambda: self.clock))


@pytest.fixture
def stub(monkeypatch, tmp_path):
    made = Stub()
    for module in (launch_config, sweeping):
        monkeypatch.setattr(module, "device_name", lambda device: NAME)
    monkeypatch.setattr(kernel_spec("rope"), "tuning_problem", made.problem)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("KEYE_KERNELS_TILES", raising=False)
    launch_config.clear_cache()
    yield made
    monkeypatch.undo()
    launch_config.clear_cache()


NO_CONFIG = {"BLOCK_T": 0, "BLOCK_H": 0, "num_warps": 0}


def used(folder, monkeypatch, shape=SMALL, default=NO_CONFIG):
    """The config of a launch."""
    monkeypatch.setenv("KEYE_KERNELS_TILES", str(folder))
    launch_config.clear_cache()
    return launch_config.launch_config("rope", CPU, kernel_spec("rope").config_key(shape, "fp16"), default)


def test_launches_use_the_fastest_config_with_a_correct_result(stub, tmp_path, monkeypatch):
    stub.bad = {1: "spills", 2: "raises", 3: "wrong", 4: "unwritten"}
    stub.microseconds |= {3: 1.0, 4: 1.0, 5: 50.0}
    result = stub.sweep(tmp_path)
    assert used(tmp_path, monkeypatch) == stub.tried[5]
    why = {stub.number(config): reason for config, reason in result.records[0].rejected}
    assert why.keys() == {1, 2, 3, 4}
    assert why[1] == "spills inside a loop" and why[2] == "RuntimeError: out of resource: shared memory"
    assert why[3].startswith("wrong result: error 1,") and why[4].startswith("wrong result: error nan")
    assert sorted(stub.benched) == [0, *range(5, len(stub.tried))]
    table = json.loads((tmp_path / "NVIDIA_Stub_9000.json").read_text())
    assert (table["device"], table["triton"]) == (NAME, launch_config.triton_version())
    [entry] = table["kernels"]["rope"]
    assert (entry["median_us"], entry["p20_us"], entry["p80_us"], entry["heuristic_us"]) == (50.0, 45.0, 55.0, 100.0)
    assert "50.0 us (heuristic 100.0 us)" in result.to_text() and str(tmp_path) in result.to_text()


def test_the_heuristic_is_kept_where_nothing_is_faster(stub, tmp_path, monkeypatch):
    stub.microseconds[3] = 99.0
    stub.sweep(tmp_path)
    assert used(tmp_path, monkeypatch) == stub.tried[0]


def test_a_launch_between_the_shapes_takes_the_nearest_entry(stub, tmp_path, monkeypatch):
    stub.sweep(tmp_path, [SMALL])
    stub.microseconds[5] = 1.0
    stub.sweep(tmp_path, [LARGE])
    for tokens, number in {8: 0, 60: 0, 1025: 5, 2**14: 5}.items():
        assert used(tmp_path, monkeypatch, TuningShape("rope", "vision", 1, tokens)) == stub.tried[number]
    assert used(tmp_path, monkeypatch, TuningShape("rope", "vision", 1, 2**20)) == NO_CONFIG


def test_without_a_working_config_no_entry_is_written(stub, tmp_path, monkeypatch):
    stub.bad = dict.fromkeys(range(len(stub.tried)), "wrong")
    assert stub.sweep(tmp_path).entries == {"rope": []}
    assert used(tmp_path, monkeypatch, default={"heuristic": 1}) == {"heuristic": 1}


def test_an_interrupted_sweep_keeps_its_results_and_can_be_resumed(stub, tmp_path, monkeypatch, capsys):
    count = len(stub.tried)
    stub.microseconds[5] = 50.0
    stub.stop_after = count + 3
    with pytest.raises(KeyboardInterrupt):
        stub.sweep(tmp_path, [SMALL, LARGE])
    error = capsys.readouterr().err
    assert "stopped after 1 of 2 shapes" in error and "--resume" in error
    assert used(tmp_path, monkeypatch) == stub.tried[5]

    stub.stop_after, stub.benched = None, []
    stub.sweep(tmp_path, [SMALL, LARGE], resume=True)
    assert stub.benched == list(range(3, count))
    stub.benched = []
    result = stub.sweep(tmp_path, [SMALL, LARGE], resume=True)
    assert stub.benched == [] and len(result.entries["rope"]) == 2
    stub.sweep(tmp_path, [SMALL, LARGE])
    assert stub.benched == 2 * list(range(count))


def test_a_second_round_starts_from_the_fastest_and_is_resumed_like_the_first(stub, tmp_path, monkeypatch):
    first, late = stub.tried[:-1], stub.tried[-1]
    monkeypatch.setattr(sweeping, "candidates", lambda *arguments, **options: first)
    asked = []
    monkeypatch.setattr(sweeping, "refinements", lambda shape, arch, fastest: asked.append(fastest[0]) or [late, first[2]])
    stub.microseconds |= {3: 60.0, len(first): 50.0}
    stub.sweep(tmp_path)
    assert asked == [stub.tried[3]] and used(tmp_path, monkeypatch) == late
    assert stub.benched == list(range(len(stub.tried)))
    stub.sweep(tmp_path, resume=True)
    assert len(stub.benched) == len(stub.tried)


def test_the_fastest_and_the_heuristics_config_are_timed_at_length(stub, tmp_path, monkeypatch):
    stub.microseconds |= {7: 50.0, 3: 80.0, 5: 60.0, 2: 70.0, 4: 85.0}
    result = stub.sweep(tmp_path)
    assert stub.finalists == [7, 5, 2, 3, 0] and plan.MAX_FINALISTS == 4
    assert used(tmp_path, monkeypatch) == stub.tried[7]
    times = {stub.number(config): times for config, times in result.records[0].timings}
    assert times[7] == [50.0, 45.0, 55.0] and times[1] == [100.0] * 3 and len(times) == len(stub.tried)
    stub.microseconds[0], stub.finalists = 1.0, []
    stub.sweep(tmp_path)
    assert stub.finalists == [0, 7, 5, 2]


def test_a_finished_shape_is_not_timed_at_length_again(stub, tmp_path):
    stub.sweep(tmp_path)
    stub.finalists = []
    stub.sweep(tmp_path, resume=True)
    assert stub.finalists == []


def test_a_long_run_decides_over_a_short_one(stub, tmp_path, monkeypatch):
    stub.microseconds |= {1: 50.0, 2: 51.0}
    long = {1: 90.0, 2: 60.0}
    monkeypatch.setattr(stub, "bench", lambda run: [(run(), long.get(stub.launched, 100.0))[1] / 1000] * 3)
    stub.sweep(tmp_path)
    assert used(tmp_path, monkeypatch) == stub.tried[2]


OTHER = TuningShape("rope", "vision", 1, 256)


def test_shapes_that_do_not_fit_are_left_out_by_name_and_resumed(stub, tmp_path, monkeypatch):
    stub.seconds, count = 1.0, len(stub.tried)
    result = stub.sweep(tmp_path, [SMALL, OTHER, LARGE], limit=count + plan.estimate(count) - 0.01)
    assert stub.benched == list(range(count)) and result.left_out == [OTHER, LARGE]
    assert [record.shape for record in result.records] == [SMALL]
    text = result.to_text()
    assert f"left out, because the time was over: {OTHER}; {LARGE}; run the same command with --resume" in text
    stub.benched = []
    result = stub.sweep(tmp_path, [SMALL, OTHER, LARGE], resume=True, limit=1e6)
    assert stub.benched == 2 * list(range(count)) and not result.left_out and "left out" not in result.to_text()


def test_estimates_are_corrected_by_what_earlier_shapes_took(stub, tmp_path):
    stub.seconds, count = 100.0, len(stub.tried)
    spent, cost = 100.0 * count, plan.estimate(count)
    factor = (TRUSTED_SECONDS + spent) / (TRUSTED_SECONDS + cost)
    assert stub.sweep(tmp_path, [SMALL, LARGE], limit=spent + cost * factor - 1).left_out == [LARGE]
    assert stub.benched == list(range(count))  # nothing of the other shape
    stub.clock = 0.0
    assert stub.sweep(tmp_path, [SMALL, LARGE], limit=spent + cost * factor + spent).left_out == []


def test_the_time_ends_within_a_shape_too(stub, tmp_path, monkeypatch):
    stub.seconds = 2.0
    stub.microseconds[1] = 50.0
    limit = 2.0 + plan.estimate(len(stub.tried))
    result = stub.sweep(tmp_path, limit=limit)
    assert stub.benched == list(range(round(limit / 2 + 0.5))) and stub.finalists == [] and result.left_out == [SMALL]
    assert used(tmp_path, monkeypatch) == stub.tried[1]
    stub.clock, stub.seconds, stub.benched = 0.0, 0.0, []
    stub.sweep(tmp_path, resume=True, limit=limit)
    assert len(stub.benched) == len(stub.tried) - round(limit / 2 + 0.5) and stub.finalists[0] == 1


def test_a_shape_with_no_time_left_is_no_failure_of_the_command(stub, tmp_path, monkeypatch, capsys):
    result = stub.sweep(tmp_path, [SMALL, LARGE])
    result.records[1].timings, result.left_out = [], [LARGE]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sweeping, "on_this_gpu", lambda: None)
    monkeypatch.setattr(sweeping, "sweep", lambda *_: result)
    assert main(["autotune", "--shapes", "small", "--kernel", "rope"]) == 0
    assert "left out" in capsys.readouterr().out


def test_time_is_reserved_for_later_shapes_with_more_candidates(stub, tmp_path):
    shapes = [SMALL, OTHER, LARGE]
    counts = {SMALL: 5, OTHER: 8, LARGE: 70}
    assert plan.reserved(SMALL, shapes, counts) == plan.estimate(8) + plan.estimate(70)
    assert plan.reserved(OTHER, shapes, counts) == plan.estimate(70) and plan.reserved(LARGE, shapes, counts) == 0
    assert plan.estimate(0) == 0 and plan.reserved(SMALL, shapes, {**counts, LARGE: 0}) == plan.estimate(8)


def test_a_shape_with_few_candidates_does_not_take_the_time_of_one_with_many(stub, tmp_path, monkeypatch):
    few, many = stub.tried[:3], stub.tried
    monkeypatch.setattr(sweeping, "candidates", lambda shape, dtype, arch: few if shape == SMALL else many)
    limit = plan.estimate(len(many)) + plan.estimate(len(few)) - 0.01
    result = stub.sweep(tmp_path, [SMALL, LARGE], limit=limit)
    assert result.left_out == [SMALL] and [record.shape for record in result.records] == [LARGE]
    assert stub.sweep(tmp_path, [LARGE, SMALL], limit=limit).left_out == []  # the clock of the stub stands still


def test_all_shapes_of_the_8b_model_fit_into_the_default_time():
    """By the estimates of plan.py, for the first round and as many configs again in the second where a kernel has one."""
    total = 0.0
    for shape in load_shapes("keye-8b", kernel_names()):
        tried = candidates(shape, "bf16", H100)
        total += plan.estimate(len(tried) + len(refinements(shape, H100, tried)))
    assert total < 60 * DEFAULT_MINUTES < 240


def test_a_short_run_has_few_launches(monkeypatch):
    log, cost = [], {"ms": 0.0}

    class Event:
        def __init__(self, enable_timing): ...

        def record(self):
            log.append("event")

        def elapsed_time(self, other):
            return cost["ms"]

    class Buffer:
        def zero_(self):
            log.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, **options: Buffer() if size == (plan.L2_FLUSH_BYTES,) else empty(*size, **options)
    )
    quick = plan.quick_timer(torch.device("cuda"))
    for milliseconds, launches in ((0.01, 21), (1.0, 4), (40.0, 2)):
        cost["ms"] = milliseconds
        log.clear()
        assert quick(lambda: log.append("launch")) == pytest.approx([milliseconds] * 3)
        assert log.count("launch") == log.count("flush") == launches and log.count("wait") == 2
        assert log[:5] == ["flush", "event", "launch", "event", "wait"]


def test_resuming_with_other_versions_starts_again(stub, tmp_path, monkeypatch):
    stub.sweep(tmp_path)
    monkeypatch.setattr("keye_kernels.tools.autotune.records._versions", lambda: {"triton": "1.0.0"})
    stub.benched = []
    stub.sweep(tmp_path, resume=True)
    assert stub.benched == list(range(len(stub.tried)))


def test_records_that_lack_a_later_field_are_completed(stub, tmp_path, monkeypatch):
    stub.microseconds[5] = 50.0
    stub.sweep(tmp_path)
    path = tmp_path / "NVIDIA_Stub_9000.sweep.json"
    records = json.loads(path.read_text())
    for config, _ in records["records"][0]["timings"]:
        assert config.pop("num_warps") is not None
    path.write_text(json.dumps(records))
    monkeypatch.setattr(sweeping, "candidates", lambda *arguments, **options: [])
    result = stub.sweep(tmp_path, resume=True)
    assert all("num_warps" in entry["config"] for entry in result.entries["rope"])


def test_a_half_written_record_is_ignored_with_a_warning(stub, tmp_path, caplog):
    (tmp_path / "NVIDIA_Stub_9000.sweep.json").write_text('{"device": "NVI')
    (tmp_path / "NVIDIA_Stub_9000.json").write_text('{"device": "NVI')
    stub.sweep(tmp_path, resume=True)
    assert len(stub.benched) == len(stub.tried)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("ignoring" in warning and "sweep.json" in warning for warning in warnings)


def test_a_device_that_stops_responding_ends_the_sweep_and_resume_skips_the_config(stub, tmp_path, monkeypatch):
    def fail(device, config):
        raise RuntimeError("the device stopped responding")

    monkeypatch.setattr(sweeping, "_check_device", fail)
    stub.bad = {2: "raises"}
    with pytest.raises(RuntimeError, match="stopped responding"):
        stub.sweep(tmp_path)
    assert stub.benched == [0, 1]
    stub.sweep(tmp_path, resume=True)
    assert stub.benched == [0, 1, *range(3, len(stub.tried))]


def test_a_folder_that_cannot_be_written_is_reported_once_and_the_sweep_continues(stub, tmp_path, capsys):
    folder = tmp_path / "file"
    folder.write_text("")
    result = stub.sweep(folder / "tables", [SMALL, LARGE])
    assert len(stub.benched) == 2 * len(stub.tried)
    path = str(folder / "tables" / "NVIDIA_Stub_9000.json")
    assert capsys.readouterr().err.count(f"{path} cannot be written") == 1
    text = result.to_text()
    assert json.loads(text[text.index("{\n") :])["kernels"]["rope"] == result.entries["rope"]


@pytest.mark.parametrize("fault, expected", [(None, 0), ("folder", 1), ("Triton's cache", 1), ("one shape", 1)])
def test_the_command_fails_if_it_cannot_save_or_no_config_works(fault, expected, stub, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "tables" if fault == "folder" else tmp_path
    if fault == "Triton's cache":
        stub.failures = lambda variant: ["PermissionError: [Errno 13] Permission denied: '/read-only'"]
    if fault == "one shape":
        check = sweeping.Checker.error
        monkeypatch.setattr(sweeping.Checker, "error", lambda self, config: check(self, config) or wrong.pop(0))
        wrong = ["wrong"] * len(stub.tried) + [None] * len(stub.tried)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sweeping, "on_this_gpu", lambda: None)
    result = stub.sweep(folder, [SMALL, LARGE])
    monkeypatch.setattr(sweeping, "sweep", lambda *_: result)
    assert main(["autotune", "--shapes", "small", "--kernel", "rope"]) == expected
    out = capsys.readouterr().out
    assert ("cannot be written" in out) == (fault == "folder")
    assert ("Permission denied: '/read-only'" in out) == (fault == "Triton's cache")
    assert out.count("no config works for") == {"Triton's cache": 2, "one shape": 1}.get(fault, 0)


def test_an_entry_that_launches_do_not_find_is_an_error(stub, tmp_path, monkeypatch):
    monkeypatch.setattr(launch_config, "launch_config", lambda kernel, device, key, heuristic: heuristic)
    stub.microseconds[5] = 50.0
    with pytest.raises(RuntimeError, match="do not find"):
        stub.sweep(tmp_path)


def test_a_table_of_another_triton_is_used_with_one_warning(stub, tmp_path, monkeypatch, caplog):
    stub.sweep(tmp_path, [SMALL, LARGE])
    monkeypatch.setattr(launch_config, "triton_version", lambda: "1.0.0")
    for shape in (SMALL, LARGE):
        assert used(tmp_path, monkeypatch, shape) == stub.tried[0]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "autotune" in warnings[0] and "1.0.0" in warnings[0]


def test_a_faster_library_is_saved_with_the_fastest_config_of_the_kernel():
    kernel, other = {"BLOCK_M": 64, "backend": "triton"}, {"BLOCK_M": 128, "backend": "triton"}
    library = {"BLOCK_M": 128, "backend": "torch"}
    found = sweeping.MeasuredShape("linear", {}, other, [(other, 9.0), (kernel, 5.0), (library, 1.0)])
    assert sweeping._with_own_config(library, found) == {"BLOCK_M": 64, "backend": "torch"}
    assert sweeping._with_own_config(kernel, found) == kernel


@pytest.mark.parametrize("kernel", kernel_names())
def test_the_configs_of_every_kernel_agree_with_the_reference(kernel, monkeypatch):
    """Real kernels in the interpreter, for a projector of 64 channels."""
    for module, name, value in (
        (patch_merge_norm_spec, "CHANNELS", 64),
        (patch_merge_norm_spec, "MERGED_WIDTH", 256),
        (position_embedding_2d_spec, "CHANNELS", 64),
        (linear_spec, "MERGED_WIDTH", 256),
        (linear_spec, "COLUMNS", {"linear_1": 256, "linear_2": 96}),
    ):
        monkeypatch.setattr(module, name, value)
    spec = kernel_spec(kernel)
    parts = {shape.part for shape in spec.shapes({"images": [[2, 4]], "prompts": [[2, 3]]})}
    for part in sorted(parts):
        shape = TuningShape(kernel, part, 2, 3)
        tried = candidates(shape, "fp16", H100)
        checker = Checker(spec.tuning_problem(shape, "fp16", CPU, reference), torch.float16)
        backends = {"triton", "torch"} if kernel == "linear" else {"triton", None}  # torch has no packed attention on a CPU
        for config in {c.get("backend"): c for c in tried[1:] if c.get("backend") in backends}.values():
            assert checker.error(config) is None
            assert checker.problem.launch(config)[0].shape[0] == shape.total
