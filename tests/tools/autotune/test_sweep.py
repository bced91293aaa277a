"""The whole tuner on a machine of its own: a stub clock and compiler, and a device that gives itself a name."""

import json
import logging
from contextlib import contextmanager
from functools import cache

import pytest
import torch

from keye_kernels.tools.autotune import kernels
from keye_kernels.tools.autotune import sweep as sweeping
from keye_kernels.tools.autotune.candidates import candidates
from keye_kernels.tools.autotune.checking import Checker
from keye_kernels.tools.autotune.problems import Problem, make_problem
from keye_kernels.tools.autotune.shapes import KERNELS, Shape
from keye_kernels.triton import tiles

CPU = torch.device("cpu")
NAME = "NVIDIA Stub 9000"
SMALL, LARGE = Shape("rope", "vision", 1, 16), Shape("rope", "vision", 1, 4096)


class Stub:
    """A GPU of 132 multiprocessors whose launches copy a tensor; by candidate number it can be slow, wrong or broken."""

    def __init__(self):
        self.tried = candidates(SMALL, "fp16", "sm_90", 132, timed=True)
        self.microseconds = dict.fromkeys(range(len(self.tried)), 100.0)
        self.bad, self.benched, self.fastest, self.launched, self.stop_after = {}, [], [], None, None

    def number(self, config):
        return self.tried.index(config)

    def failures(self, variant):
        return ["spills inside a loop"] if self.bad.get(self.number(dict(variant.config))) == "spills" else []

    def submit(self, variants): ...

    def problem(self, shape, dtype, device):
        x = torch.arange(8.0)

        def launch(config):
            self.launched = self.number(config)
            kind = self.bad.get(self.launched)
            if kind == "raises":
                raise RuntimeError("out of resource: shared memory")
            memory = torch.empty(8, dtype=dtype)
            if kind == "unwritten" and memory.isnan().all():
                return (memory,)
            return ((x + (kind == "wrong")).to(dtype),)  # as memory that nobody filled would still hold

        return Problem(launch, lambda dtype: (x.to(dtype),), torch.arange(8))

    def bench(self, run, fastest):
        self.fastest.append(fastest)
        if self.stop_after == len(self.benched):
            raise KeyboardInterrupt
        run()
        self.benched.append(self.launched)
        time = self.microseconds[self.launched] / 1000
        return [time, 0.9 * time, 1.1 * time]

    def sweep(self, folder, shapes=(SMALL,), resume=False):
        @contextmanager
        def compiler():
            yield self

        machine = sweeping.Machine(CPU, "sm_90", 132, self.bench, compiler)
        return sweeping.sweep(machine, list(shapes), "fp16", folder, resume)


@pytest.fixture
def stub(monkeypatch, tmp_path):
    made = Stub()
    monkeypatch.setattr(tiles, "device_name", cache(lambda device: NAME))
    monkeypatch.setattr(sweeping, "make_problem", made.problem)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("KEYE_KERNELS_TILES", raising=False)
    tiles.clear_cache()
    yield made
    monkeypatch.undo()
    tiles.clear_cache()


NO_TILE = {"BLOCK_T": 0, "BLOCK_H": 0, "num_warps": 0}


def served(folder, monkeypatch, shape=SMALL, default=NO_TILE):
    """The tile that a launch takes."""
    monkeypatch.setenv("KEYE_KERNELS_TILES", str(folder))
    tiles.clear_cache()
    return tiles.tile("rope", CPU, kernels.table_key(shape, "fp16"), default)


def test_the_fastest_tile_that_is_right_serves_launches(stub, tmp_path, monkeypatch):
    stub.bad = {1: "spills", 2: "raises", 3: "wrong", 4: "unwritten"}
    stub.microseconds |= {3: 1.0, 4: 1.0, 5: 50.0}
    outcome = stub.sweep(tmp_path)
    assert served(tmp_path, monkeypatch) == stub.tried[5]
    why = {stub.number(config): reason for config, reason in outcome.records[0].rejected}
    assert why.keys() == {1, 2, 3, 4}
    assert why[1] == "spills inside a loop" and why[2] == "RuntimeError: out of resource: shared memory"
    assert why[3].startswith("wrong: off by 1,") and why[4].startswith("wrong: off by nan")
    assert sorted(stub.benched) == [0, *range(5, len(stub.tried))]
    table = json.loads((tmp_path / "NVIDIA_Stub_9000.json").read_text())
    assert (table["device"], table["triton"], table["method"]) == (NAME, tiles.triton_version(), "timed")
    [entry] = table["kernels"]["rope"]
    assert (entry["median_us"], entry["p20_us"], entry["p80_us"], entry["heuristic_us"]) == (50.0, 45.0, 55.0, 100.0)
    assert "50.0 us (heuristic 100.0 us)" in outcome.to_text() and str(tmp_path) in outcome.to_text()


def test_the_heuristic_stays_where_nothing_is_faster(stub, tmp_path, monkeypatch):
    stub.microseconds[3] = 99.0
    stub.sweep(tmp_path)
    assert served(tmp_path, monkeypatch) == stub.tried[0]


def test_a_launch_between_the_shapes_takes_the_nearest_entry(stub, tmp_path, monkeypatch):
    stub.sweep(tmp_path, [SMALL])
    stub.microseconds[5] = 1.0
    stub.sweep(tmp_path, [LARGE])
    near = {8: 0, 60: 0, 1025: 5, 2**14: 5}
    for tokens, number in near.items():
        assert served(tmp_path, monkeypatch, Shape("rope", "vision", 1, tokens)) == stub.tried[number]
    assert served(tmp_path, monkeypatch, Shape("rope", "vision", 1, 2**20)) == NO_TILE


def test_where_nothing_serves_no_entry_is_written(stub, tmp_path, monkeypatch):
    stub.bad = dict.fromkeys(range(len(stub.tried)), "wrong")
    assert stub.sweep(tmp_path).entries == {"rope": []}
    assert served(tmp_path, monkeypatch, default={"heuristic": 1}) == {"heuristic": 1}


def test_an_interrupted_sweep_keeps_what_it_found_and_goes_on(stub, tmp_path, monkeypatch, capsys):
    count = len(stub.tried)
    stub.microseconds[5] = 50.0
    stub.stop_after = count + 3
    with pytest.raises(KeyboardInterrupt):
        stub.sweep(tmp_path, [SMALL, LARGE])
    assert "stopped after 1 of 2 shapes" in (said := capsys.readouterr().err) and "--resume" in said
    assert served(tmp_path, monkeypatch) == stub.tried[5]

    stub.stop_after, stub.benched = None, []
    stub.sweep(tmp_path, [SMALL, LARGE], resume=True)
    assert stub.benched == list(range(3, count))
    stub.benched = []
    outcome = stub.sweep(tmp_path, [SMALL, LARGE], resume=True)
    assert stub.benched == [] and len(outcome.entries["rope"]) == 2
    stub.sweep(tmp_path, [SMALL, LARGE])
    assert stub.benched == 2 * list(range(count))


def test_a_second_round_starts_from_the_fastest_and_is_resumed_like_the_first(stub, tmp_path, monkeypatch):
    first, late = stub.tried[:-1], stub.tried[-1]
    monkeypatch.setattr(sweeping, "candidates", lambda *arguments, **options: first)
    asked = []
    monkeypatch.setattr(sweeping, "refine", lambda shape, target, fastest: asked.append(fastest[0]) or [late, first[2]])
    stub.microseconds |= {3: 60.0, len(first): 50.0}
    stub.sweep(tmp_path)
    assert asked == [stub.tried[3]] and served(tmp_path, monkeypatch) == late
    assert stub.benched == list(range(len(stub.tried)))
    stub.sweep(tmp_path, resume=True)
    assert len(stub.benched) == len(stub.tried)


def test_the_clock_is_told_of_the_fastest_so_far(stub, tmp_path):
    stub.microseconds |= {1: 80.0, 2: 90.0}
    stub.sweep(tmp_path)
    assert stub.fastest[:4] == [None, 0.1, 0.08, 0.08]


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
    outcome = stub.sweep(tmp_path, resume=True)
    assert all("num_warps" in entry["config"] for entry in outcome.entries["rope"])


def test_a_half_written_record_is_ignored_with_a_warning(stub, tmp_path, caplog):
    (tmp_path / "NVIDIA_Stub_9000.sweep.json").write_text('{"device": "NVI')
    (tmp_path / "NVIDIA_Stub_9000.json").write_text('{"device": "NVI')
    stub.sweep(tmp_path, resume=True)
    assert len(stub.benched) == len(stub.tried)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("sweep.json is ignored" in warning for warning in warnings)


def test_a_device_that_fails_for_good_ends_the_sweep_and_the_tile_is_passed_over(stub, tmp_path, monkeypatch):
    def fail(device, config):
        raise RuntimeError("the device no longer answers")

    monkeypatch.setattr(sweeping, "_check_device", fail)
    stub.bad = {2: "raises"}
    with pytest.raises(RuntimeError, match="no longer answers"):
        stub.sweep(tmp_path)
    assert stub.benched == [0, 1]
    stub.sweep(tmp_path, resume=True)
    assert stub.benched == [0, 1, *range(3, len(stub.tried))]


def test_a_folder_that_cannot_be_written_is_named_once_and_the_sweep_goes_on(stub, tmp_path, capsys):
    folder = tmp_path / "file"
    folder.write_text("")
    outcome = stub.sweep(folder / "tables", [SMALL, LARGE])
    assert len(stub.benched) == 2 * len(stub.tried)
    path = str(folder / "tables" / "NVIDIA_Stub_9000.json")
    assert capsys.readouterr().err.count(f"{path} cannot be written") == 1
    text = outcome.to_text()
    assert json.loads(text[text.index("{\n") :])["kernels"]["rope"] == outcome.entries["rope"]


def test_a_table_that_launches_do_not_take_is_an_error(stub, tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "tile", lambda kernel, device, key, heuristic: heuristic)
    stub.microseconds[5] = 50.0
    with pytest.raises(RuntimeError, match="does not serve"):
        stub.sweep(tmp_path)


def test_a_table_of_another_triton_serves_and_warns_once(stub, tmp_path, monkeypatch, caplog):
    stub.sweep(tmp_path, [SMALL, LARGE])
    monkeypatch.setattr(tiles, "triton_version", cache(lambda: "1.0.0"))
    for shape in (SMALL, LARGE):
        assert served(tmp_path, monkeypatch, shape) == stub.tried[0]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "autotune" in warnings[0] and "1.0.0" in warnings[0]


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_tiles_of_every_kernel_agree_with_the_reference(kernel, monkeypatch):
    """Real kernels in the interpreter, at a projector of 64 channels."""
    for name, size in (("CHANNELS", 64), ("HIDDEN", 256), ("OUT", 96)):
        monkeypatch.setattr(kernels, name, size)
    parts = {"rope": ("text", "vision"), "varlen_attention": ("text", "vision"), "patch_merge": ("block", "raster")}
    for part in parts.get(kernel, ("vision",)):
        shape = Shape(kernel, part, 2, 3)
        tried = candidates(shape, "fp16", "sm_90", 132, timed=True)
        checker = Checker(make_problem(shape, torch.float16, CPU), torch.float16)
        for config in {config.get("path"): config for config in tried[1:]}.values():
            assert checker.error(config) is None
            assert checker.problem.launch(config)[0].shape[0] == shape.total
