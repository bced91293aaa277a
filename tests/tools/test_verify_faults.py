"""`verify` finds planted faults that are a few times larger than rounding errors, and wrong answers of both models.

Rounding explains errors of less than a third to a half of SMALLEST_FAULTS. With tolerances ten times as wide, these tests fail.
"""

import pytest
import torch

from keye_kernels.tools.verify import answers, checks
from keye_kernels.triton.registry import verify_cases

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Relative to the output: in float32, and in units of eps in 16 bit
SMALLEST_FAULTS = {
    "add_norm": (2e-7, 1.5),
    "cache_attention": (1.3e-4, 4.5),
    "silu_mul": (1.2e-5, 1.5),
    "linear_few_rows": (1e-5, 1.5),
    "position_embedding_2d": (1.6e-6, 1.5),
    "rope_2d": (7e-6, 1.5),
    "rope_3d": (1e-5, 1.5),
    "rope_3d_to_cache": (1e-5, 1.5),
    "patch_merge_projection": (1.2e-5, 9.0),
    "varlen_attention": (1.3e-4, 4.5),
    "sharp": (3.5e-4, 5.0),  # attention with probabilities near 1
}
SMALLEST_LSE_FAULT = 6e-6  # lse is float32 in every dtype
REAL_SIZES = ("rope_2d", "position_embedding_2d")  # fast enough on a CPU
CASES = [
    *((f"{case.operator}: {case.label}", case) for case in verify_cases(False, checks.run_reference)),
    *((f"{c.operator}: {c.label}", c) for c in verify_cases(True, checks.run_reference) if c.operator in REAL_SIZES),
]
each_case = pytest.mark.parametrize("case", [case for _, case in CASES], ids=[name for name, _ in CASES])


def smallest_fault(case, dtype):
    in_float32, in_eps = SMALLEST_FAULTS["sharp" if "sharp" in case.label else case.operator]
    return in_float32 if dtype == torch.float32 else in_eps * torch.finfo(dtype).eps


def check(monkeypatch, case, dtype, change):
    """The result of a case whose operator computes `change(outputs)` of the reference's outputs."""
    run = checks.run_case
    monkeypatch.setattr(checks, "run_case", lambda *arguments: change([x.clone() for x in run(*arguments)]))
    result = checks.check(case, dtype, CPU, "reference", seeds=1, runs=1)
    monkeypatch.undo()
    return result


@each_case
def test_outputs_with_a_relative_fault_fail(case, monkeypatch):
    for dtype in DTYPES:
        for factor in (1, 10, 1000):
            fault = factor * smallest_fault(case, dtype)

            def change(outputs, scale=1 + fault, dtype=dtype):
                return [outputs[0].double().mul(scale).to(dtype), *outputs[1:]]

            result = check(monkeypatch, case, dtype, change)
            assert not result.passed and result.error > result.allowed, (dtype, factor)


@each_case
def test_one_wrong_element_fails(case, monkeypatch):
    for dtype in DTYPES:
        fault = 2 * smallest_fault(case, dtype)

        def change(outputs, fault=fault):
            largest = outputs[0].abs().argmax()
            outputs[0].view(-1)[largest] *= 1 + fault
            return outputs

        result = check(monkeypatch, case, dtype, change)
        assert not result.passed and result.error > result.allowed, dtype


@pytest.mark.parametrize("case", [case for _, case in CASES if "lse" in case.label], ids=lambda case: case.label)
def test_a_wrong_second_output_fails(case, monkeypatch):
    for dtype in DTYPES:
        result = check(monkeypatch, case, dtype, lambda outputs: [outputs[0], outputs[1] * (1 + SMALLEST_LSE_FAULT)])
        assert not result.passed and result.error > result.allowed, dtype


@pytest.mark.parametrize("output", [1, 2], ids=["keys", "values"])
def test_one_wrong_element_of_a_cache_fails(output, monkeypatch):
    """In a slot that was written and in one that was not; values are copied, so that no error is allowed."""
    case = next(case for _, case in CASES if case.operator == "rope_3d_to_cache")
    for slot in (0, 1):

        def change(outputs, slot=slot):
            outputs[output][1, slot].view(-1)[3] *= 1.01
            return outputs

        result = check(monkeypatch, case, torch.float32, change)
        assert not result.passed and result.error > result.allowed, slot


def test_every_run_starts_with_the_old_values():
    """Else a run that writes nothing would find the values of the run before it."""
    case = next(case for _, case in CASES if case.operator == "rope_3d_to_cache")
    arguments = checks.cast(case.draw(torch.Generator().manual_seed(0)), torch.float32, CPU)
    before = {name: arguments[name].clone() for name in case.written}
    _, *written = checks.run_case(case, arguments, "reference")
    for name, new in zip(case.written, written, strict=True):
        assert torch.equal(arguments[name], before[name]) and not torch.equal(new, before[name])


@pytest.mark.parametrize("error, passed", [(1.0, True), (1.0001, False), (float("nan"), False)])
def test_a_check_passes_up_to_its_tolerance(error, passed):
    assert checks.CheckResult("rope_2d", "", "fp32", error, 1.0, 1, 0, "ok", 0.0).passed == passed


def test_answers_that_are_wrong_in_both_models_fail(monkeypatch):
    """The tokens agree, so only the right answers show the fault."""
    load = answers.small_model

    def load_broken(**options):
        model = load(**options | {"impl": "reference"})
        model.visual.post_layernorm.weight.data.neg_()
        return model

    monkeypatch.setattr(answers, "small_model", load_broken)
    results = answers.check_answers(CPU, "reference")
    assert [result.error for result in results if not result.passed] == [1.0] * len(results)


def test_every_question_has_its_right_answer():
    for _, question, right in answers.questions():
        assert right, question
