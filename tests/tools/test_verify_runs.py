"""`verify` runs what it says: how many inputs and repetitions, in which dtypes and sizes, and which elements it compares."""

import dataclasses
import json
import os
from types import SimpleNamespace

import pytest
import torch

from keye_kernels.cli import main
from keye_kernels.small import small_processor
from keye_kernels.tools import verify
from keye_kernels.tools.verify import answers, checks
from keye_kernels.triton.cases import VerifyCase

CPU = torch.device("cpu")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def test_a_gpu_is_verified_at_real_sizes_in_every_dtype_with_ten_runs(gpu, monkeypatch):
    device = torch.device("cuda")
    assert verify.choose_setup() == verify.Setup(device, "triton", True, (F32, F16, BF16), 10, [])
    assert verify.choose_setup("cuda:0").device == torch.device("cuda:0")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="TRITON_INTERPRET must not be 1"):
        verify.choose_setup()


def test_a_cpu_is_verified_at_small_sizes_with_two_runs():
    setup = verify.choose_setup("cpu")
    assert setup[:5] == (CPU, "triton", False, (F32, F16), 2) and len(setup.notes) == 3
    assert os.environ["TRITON_INTERPRET"] == "1"


@pytest.mark.parametrize("device, runs", [("cpu", 2), ("cuda", 10)])
def test_without_triton_the_reference_is_verified(device, runs, gpu, monkeypatch):
    monkeypatch.setattr(verify.importlib.util, "find_spec", lambda name: None)
    setup = verify.choose_setup(device)
    assert setup[:5] == (torch.device(device), "reference", device == "cuda", (F32, F16, BF16), runs) and len(setup.notes) == 1


def passing(operator="rope_2d", error=0.5, seconds=0.0, **changes):
    return checks.CheckResult(operator, "a case", "fp32", error, 1.0, 4, 1 if changes.get("differ") else 0, "ok", seconds)


@pytest.fixture
def calls(monkeypatch):
    """Records the calls of `check`, which pass, and of `check_answers`."""
    made = []
    monkeypatch.setattr(verify, "check", lambda *arguments: made.append(arguments) or passing())
    monkeypatch.setattr(verify, "check_answers", lambda *arguments: made.append(arguments) or [passing("small model")])
    monkeypatch.setattr(
        verify, "verify_cases", lambda *arguments: made.append(arguments) or [SimpleNamespace(operator="rope_2d")]
    )
    return made


def test_each_case_gets_the_seeds_runs_dtypes_and_sizes_of_the_setup(calls):
    setup = verify.Setup(CPU, "triton", True, (F32, BF16), 7, [])
    reported = []
    results = verify.verify(setup, seeds=3, report=reported.append)
    sizes, *checked, asked = calls
    assert sizes == (True, checks.run_reference)
    assert [arguments[1:] for arguments in checked] == [(dtype, CPU, "triton", 3, 7) for dtype in (F32, BF16)]
    assert asked == (CPU, "triton")
    assert reported == results and [result.operator for result in results] == ["rope_2d", "rope_2d", "small model"]


@pytest.mark.parametrize("as_json", [[], ["--json"]])
@pytest.mark.parametrize("seeds, expected", [([], 2), (["--seeds", "5"], 5)])
def test_the_command_passes_the_seeds_on(as_json, seeds, expected, calls, capsys):
    assert main(["verify", "--device", "cpu", *as_json, *seeds]) == 0
    assert {arguments[4] for arguments in calls if len(arguments) == 6} == {expected}
    out = capsys.readouterr().out
    if as_json:
        found = json.loads(out)
        assert found["passed"] and len(found["results"]) == 3 and found["implementation"] == "triton"
    else:
        assert out.count("pass\n") == 3 and "3 of 3 checks pass, 0 FAIL" in out


@pytest.mark.parametrize("as_json", [[], ["--json"]])
@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_one_failing_check_of_any_kind_fails_the_command(as_json, wrong, calls, monkeypatch, capsys):
    results = [passing() for _ in range(3)]
    results[wrong] = passing(error=float("inf"))

    def run(setup, *, seeds, report=lambda result: None):
        for result in results:
            report(result)
        return results

    monkeypatch.setattr(verify, "verify", run)
    assert main(["verify", "--device", "cpu", *as_json]) == 1
    out = capsys.readouterr().out
    if as_json:
        assert [line["passed"] for line in json.loads(out)["results"]] == [index != wrong for index in range(3)]
    else:
        assert "2 of 3 checks pass, 1 FAIL" in out and out.count("FAIL\n") == 1


def test_the_table_shows_how_many_runs_were_equal():
    assert "  3/4  " in verify._line(passing(differ=True)) and "FAIL" in verify._line(passing(differ=True))
    assert "  4/4  " in verify._line(passing()) and "pass" in verify._line(passing())


def case(change=lambda x, seed: x, allowed=0.1):
    """A case whose operator computes `change(x, seed)` where x is right. Its input holds the seed and three elements."""

    def draw(generator):
        return {"x": torch.tensor([float(generator.initial_seed()), 1.0, 2.0, 3.0])}

    def truth(arguments, dtype):
        x = arguments["x"]
        assert x.dtype == torch.float64
        return [(x, torch.full_like(x, allowed))]

    made = VerifyCase("copy", "a copy", draw, truth)
    checks.ops.copy = lambda x, impl: change(x.clone(), int(x[0]))
    return made


@pytest.fixture(autouse=True)
def no_operator_is_left():
    yield
    vars(checks.ops).pop("copy", None)


def check(made, seeds=1, runs=1, dtype=F32):
    return checks.check(made, dtype, CPU, "reference", seeds, runs)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_worst_of_all_inputs_counts(seed):
    def wrong_for_one_input(x, found):
        x[2] += 5.0 if found == seed else 0.01
        return x

    result = check(case(wrong_for_one_input), seeds=3)
    assert not result.passed and result.error == 5.0


def test_the_worst_element_is_the_one_with_the_largest_share_of_its_allowance():
    exact = torch.zeros(3, dtype=torch.float64)
    allowed = torch.tensor([10.0, 1.0, 0.1], dtype=torch.float64)
    outputs = torch.tensor([9.0, 0.5, 0.2])
    error, limit = checks.worst_element([outputs], [(exact, allowed)])
    assert (round(error, 6), limit) == (0.2, 0.1)
    # Of several outputs, in any order
    right = torch.zeros(3)
    for pair in ((outputs, right), (right, outputs)):
        assert checks.worst_element(pair, [(exact, allowed)] * 2)[1] == 0.1


@pytest.mark.parametrize("index", [0, 2])
def test_one_nan_is_an_infinite_error(index):
    exact, outputs = torch.zeros(3, dtype=torch.float64), torch.zeros(3)
    outputs[index] = torch.nan
    assert checks.worst_element([outputs], [(exact, exact + 1)]) == (torch.inf, 1.0)


def test_a_nan_of_an_operator_fails():
    result = check(case(lambda x, seed: x * torch.nan))
    assert not result.passed and result.error == torch.inf


@pytest.mark.parametrize("runs", [2, 5, 10])
def test_every_repetition_is_compared_with_the_first_run(runs):
    count = []

    def racing(x, seed):
        count.append(seed)
        x[1] += 0.001 * (len(count) == runs)  # the last repetition differs
        return x

    result = check(case(racing), runs=runs)
    assert result.runs == runs and result.runs_that_differ == 1 and result.error <= result.allowed and not result.passed


def test_a_wrong_result_is_not_reported_as_an_access_out_of_bounds():
    result = check(case(lambda x, seed: x + 1))
    assert not result.passed and result.guards == "ok" and result.error == pytest.approx(1.0)


@pytest.mark.parametrize("position", [-1, "end"], ids=["before", "after"])
@pytest.mark.parametrize("name", ["empty", "empty_like", "new_empty"])
def test_writes_next_to_any_allocation_are_found(name, position):
    def faulty(x, seed):
        allocate = {"empty": lambda: torch.empty(x.shape), "empty_like": lambda: torch.empty_like(x)}
        out = allocate.get(name, lambda: x.new_empty(x.shape))()
        out.copy_(x)
        if out.untyped_storage().nbytes() > out.nbytes:
            offset = out.storage_offset() + (out.numel() if position == "end" else position)
            out.as_strided((1,), (1,), offset).zero_()
        return out

    assert check(case(faulty)).guards == "wrote next to an output"


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_only_floating_point_arguments_are_cast_and_frequencies_are_not(dtype):
    given = {"q": torch.ones(2), "inv_freq": torch.ones(2), "position_ids": torch.ones(2, dtype=torch.int32), "scale": 0.5}
    given["grid_thw"] = torch.ones(1, 3)
    found = checks.cast(given, dtype, CPU)
    dtypes = {name: value.dtype for name, value in found.items() if name != "scale"}
    assert dtypes == {"q": dtype, "inv_freq": F32, "position_ids": torch.int32, "grid_thw": F32} and found["scale"] == 0.5


@pytest.mark.parametrize(
    "kernel, reference, error",
    [
        ("right", "right", 0),
        ("right and end", "right", 1),
        ("right", "right and end", 1),
        ("wrong", "wrong", 1),
        ("wrong", "right", 1),
    ],
)
def test_answers_are_compared_with_the_reference_and_with_the_right_one(kernel, reference, error, monkeypatch):
    """A special token at the end does not change the answer, but the tokens."""
    processor = small_processor()
    encode = processor.tokenizer.encode
    image, question, right = answers.questions()[1]
    end = [processor.tokenizer.eos_token_id]
    tokens = {"right": encode(right), "right and end": encode(right) + end, "wrong": encode("two")}

    def load(*, dtype, device, impl):
        chosen = tokens[kernel if impl == "triton" else reference]
        return SimpleNamespace(generate=lambda input_ids, **_: torch.cat([input_ids, torch.tensor([chosen])], dim=1))

    monkeypatch.setattr(answers, "questions", lambda: [(image, question, right)])
    monkeypatch.setattr(answers, "small_model", load)
    [result] = answers.check_answers(CPU, "triton")
    assert result.passed == (error == 0) and (result.error >= 1) == bool(error)
    assert result.allowed == 0.0 and dataclasses.replace(result, error=0.0).passed


def test_the_kernels_are_compared_with_the_reference(monkeypatch):
    loaded = []
    load = answers.small_model
    monkeypatch.setattr(
        answers, "small_model", lambda **options: loaded.append(options) or load(**options | {"impl": "reference"})
    )
    monkeypatch.setattr(answers, "questions", lambda: [])
    answers.check_answers(CPU, "triton")
    assert loaded == [{"dtype": F32, "device": CPU, "impl": impl} for impl in ("triton", "reference")]
