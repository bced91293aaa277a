"""`doctor` draws the right conclusions: versions exactly at a limit, GPUs of other vendors, why an implementation was chosen."""

import json
from types import SimpleNamespace

import pytest
import torch

from keye_kernels.ops.implementation import IMPLEMENTATIONS
from keye_kernels.tools import doctor
from keye_kernels.tools.doctor import machine, versions
from keye_kernels.tools.doctor.versions import PACKAGES, REQUIRED, Package, Problem, version_problems
from keye_kernels.triton import launch_config

GOOD = {"torch": "2.13.0+cu130", "triton": "3.9.0", "numpy": "2.3.5", "transformers": "5.19.0"}


def problems(changes, pinned=None, interprets=True, errors=None):
    found = dict.fromkeys(REQUIRED, "99.0") | GOOD | changes
    packages = {name: Package(found.get(name), (errors or {}).get(name)) for name in PACKAGES}
    return version_problems(packages, pinned, interprets)


@pytest.mark.parametrize(
    ("name", "oldest", "older"),
    [
        ("torch", "2.6", "2.5.9"),
        ("triton", "3.4", "3.3.1"),
        ("numpy", None, "1.0"),
        ("transformers", "4.57", "4.56.9"),
        ("vllm", "0.32", "0.31.9"),
        ("flash_attn", None, "0.1"),
    ],
)
def test_the_oldest_supported_version_is_no_problem_and_an_older_one_is(name, oldest, older):
    oldest = oldest or versions.supported_versions(PACKAGES[name][0]).oldest
    for version in (oldest, f"{oldest}.0", f"{oldest}+cu130", f"{oldest}.post1"):
        assert problems({name: version}) == [], version
    [problem] = problems({name: older})
    assert older in problem.what and oldest in problem.what + problem.fix


@pytest.mark.parametrize(
    "changes",
    [
        {"vllm": "0.32.0", "transformers": "5.19.9"},
        {"kernels": "0.18.2", "transformers": "5.23.0"},
        {"kernels": "0.18.1", "transformers": "5.22.9"},
        {"triton": "3.7.0", "numpy": "2.4.0"},
        {"triton": "3.6.0", "numpy": "2.3.9"},
        {"transformers": "5.23.9"},
    ],
    ids=str,
)
def test_pairs_just_outside_of_a_known_failure_are_no_problem(changes):
    assert problems(changes) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"vllm": "0.32.0", "transformers": "5.20"},
        {"kernels": "0.18.1", "transformers": "5.23"},
        {"triton": "3.6.9", "numpy": "2.4"},
        {"transformers": "5.24"},
    ],
    ids=str,
)
def test_pairs_at_the_start_of_a_known_failure_are_a_problem(changes):
    assert len(problems(changes)) == 1


def test_the_failure_of_the_interpreter_is_no_problem_on_a_gpu():
    changes = {"triton": "3.6.0", "numpy": "2.4.0"}
    assert problems(changes, interprets=False) == [] and len(problems(changes)) == 1


def test_only_the_first_two_numbers_of_triton_must_be_those_of_torchs_triton():
    assert problems({"triton": "3.9.1"}, "3.9.0") == []
    [problem] = problems({"triton": "3.8.0"}, "3.9.0")
    assert problem.fix == "pip install triton==3.9.0"
    assert problems({"triton": "unknown version"}, "3.9.0") == []


@pytest.mark.parametrize("name", REQUIRED)
def test_every_required_package_is_reported_if_it_is_missing(name):
    [problem] = problems({name: None})
    assert problem.what == f"{name} is not installed" and problem.fix == f"pip install {PACKAGES[name][0]}"


def test_a_triton_that_cannot_be_imported_is_reinstalled_in_the_version_of_torch():
    for pinned, version in (("3.8.0", "3.8.0"), (None, "3.9.0")):
        first, *_ = problems({}, pinned, errors={"triton": "OSError: libcuda"})
        assert "3.9.0, cannot be imported (OSError: libcuda)" in first.what
        assert first.fix == f"pip install --force-reinstall --no-deps triton=={version}"
    [other] = problems({}, errors={"numpy": "ImportError"})
    assert other.fix == "pip install --force-reinstall numpy"


@pytest.mark.parametrize(
    ("requirements", "expected"),
    [
        (["numpy", "triton==3.9.0; platform_system == 'Linux'"], "3.9.0"),
        (["filelock", "pytorch-triton-rocm==3.8.0", "sympy"], "3.8.0"),
        (["triton>=3.0", "tritonclient==2.0"], None),
        ([], None),
        (None, None),
    ],
)
def test_torchs_triton_is_read_from_its_requirements(requirements, expected, monkeypatch):
    monkeypatch.setattr(versions, "requires", lambda name: requirements)
    assert versions.torchs_triton() == expected


def test_a_package_is_found_under_any_of_its_names(monkeypatch):
    monkeypatch.setattr(versions, "_version", {"triton-rocm": "3.9.0"}.get)
    assert versions._find("json", ("triton", "triton-rocm")) == Package("3.9.0")
    assert versions._find("json", ("triton",)) == Package(json.__version__)
    assert versions._find("no_such_module", ("triton-rocm",)) == Package(None)


@pytest.fixture
def gpu(monkeypatch):
    """A healthy machine with an A100; returns what torch reports."""
    properties = SimpleNamespace(name="NVIDIA A100", major=8, minor=0, multi_processor_count=108)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(machine, "_nvidia_driver", lambda: "580.65.06")
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/bin/{name}" if name == "clang" else None)
    for name in ("TRITON_INTERPRET", "CC"):
        monkeypatch.delenv(name, raising=False)
    return properties


PACKAGES_OF_A_GPU = {"torch": Package("2.13.0"), "triton": Package("3.9.0")}


def test_the_oldest_supported_gpu_has_no_problem(gpu, monkeypatch):
    found, broken = machine.find_device(PACKAGES_OF_A_GPU)
    assert broken == [] and found["type"] == "cuda" and found["driver"] == "580.65.06"
    assert (found["capability"], found["multiprocessors"], found["count"]) == ("8.0", 108, 4)
    assert (found["memory_gib"], found["free_gib"]) == (80.0, 30.0)
    gpu.major, gpu.minor = 7, 9
    [problem] = machine.find_device(PACKAGES_OF_A_GPU)[1]
    assert "7.9 is below 8.0" in problem.what
    monkeypatch.setattr(torch.version, "hip", "7.0")  # the numbers of an AMD GPU mean something else
    assert machine.find_device(PACKAGES_OF_A_GPU)[1] == []


@pytest.mark.parametrize("interpret, count", [("0", 0), ("1", 1)])
def test_the_interpreter_on_a_gpu_is_a_problem(interpret, count, gpu, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    assert len(machine.find_device(PACKAGES_OF_A_GPU)[1]) == count


def test_a_compiler_is_found_by_name_or_in_cc(gpu, monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    [problem] = machine.find_device(PACKAGES_OF_A_GPU)[1]
    assert "no C compiler" in problem.what
    monkeypatch.setenv("CC", "/opt/cc")
    assert machine.find_device(PACKAGES_OF_A_GPU)[1] == []


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), AssertionError("no driver"), OSError("gone")])
def test_a_gpu_that_does_not_answer_is_a_problem(error, gpu, monkeypatch):
    def fail(device):
        raise error

    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    found, [problem] = machine.find_device(PACKAGES_OF_A_GPU)
    assert found["type"] == "cpu" and "the GPU does not answer" in problem.what and str(error) in problem.what


@pytest.mark.parametrize(("cuda", "text"), [(None, "built without CUDA"), ("13.0", "for CUDA 13.0")])
def test_a_driver_without_a_gpu_in_torch_is_a_problem_with_any_build(cuda, text, gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    _, [problem] = machine.find_device(PACKAGES_OF_A_GPU)
    assert text in problem.what and "580.65.06" in problem.what
    monkeypatch.setattr(machine, "_nvidia_driver", lambda: None)
    assert machine.find_device(PACKAGES_OF_A_GPU)[1] == []


@pytest.mark.parametrize(
    ("device", "requested", "impl", "why"),
    [
        ("cpu", None, "reference", "there is no GPU"),
        ("cuda", None, "triton", "there is a GPU, and Triton is installed"),
        ("cuda", None, "reference", "Triton is not installed"),
        ("cpu", "reference", "reference", "KEYE_KERNELS_IMPL=reference"),
        ("cpu", "auto", "reference", "there is no GPU"),
    ],
)
def test_the_reason_of_each_implementation(device, requested, impl, why, monkeypatch):
    from keye_kernels.ops import implementation

    monkeypatch.delenv("KEYE_KERNELS_IMPL", raising=False)
    if requested:
        monkeypatch.setenv("KEYE_KERNELS_IMPL", requested)
    monkeypatch.setattr(implementation, "resolve", lambda name, operator, device: impl)
    rows, broken = machine.find_operators(device)
    assert broken == [] and {(row["implementation"], row["why"]) for row in rows} == {(impl, why)}


def test_the_first_table_that_exists_is_shown(monkeypatch, tmp_path):
    folders = [tmp_path / name for name in "abc"]
    for folder, kernels in zip(folders[1:], (["rope"], ["linear"]), strict=True):
        folder.mkdir()
        table = {"triton": "3.9.0", "kernels": {name: [] for name in kernels}}
        (folder / "NVIDIA_A100.json").write_text(json.dumps(table))
    monkeypatch.setattr("keye_kernels.triton.device.device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(launch_config, "table_folders", lambda: folders)
    assert machine.find_tables("cuda") == {"table": str(folders[1] / "NVIDIA_A100.json"), "triton": "3.9.0", "kernels": "rope"}
    assert machine.find_tables("cpu")["table"] is None


@pytest.mark.parametrize("finding", [{"runs_that_differ": 1}, {"guards": "wrote next to q"}, {"error": 2.0}, {}])
def test_any_finding_fails_the_self_test(finding, monkeypatch):
    from keye_kernels.tools.verify import checks

    calls = []

    def check(case, dtype, device, impl, seeds, runs):
        calls.append((dtype, device, impl, seeds, runs))
        good = {"error": 0.5, "allowed": 1.0, "runs": runs, "runs_that_differ": 0, "guards": "ok", "seconds": 0.0}
        changes = finding if case.operator == "rope_2d" else {}
        return checks.CheckResult(case.operator, case.label, "fp32", **good | changes)

    monkeypatch.setattr(checks, "check", check)
    found, broken = machine.self_test("cpu", "reference")
    assert set(calls) == {(torch.float32, torch.device("cpu"), "reference", 1, 2)} and len(calls) == len(IMPLEMENTATIONS)
    assert found["failed"] == (["rope_2d"] if finding else []) and len(broken) == bool(finding)
    text = doctor.to_text(doctor.Diagnosis(self_test=found))
    assert f"{len(IMPLEMENTATIONS) - bool(finding)} of {len(IMPLEMENTATIONS)} operators agree with float64" in text


def test_all_problems_are_kept_and_shown(monkeypatch, capsys):
    first, second, third = (Problem(f"problem {name}", f"fix {name}") for name in "abc")
    seen = []
    monkeypatch.setattr(doctor, "find_packages", lambda: {"torch": Package("2.13.0")})
    monkeypatch.setattr(doctor, "torchs_triton", lambda: "3.9.0")
    monkeypatch.setattr(doctor, "version_problems", lambda *arguments: seen.append(arguments[1:]) or [second])
    monkeypatch.setattr(doctor, "find_operators", lambda kind: ([], [third]))
    monkeypatch.setattr(doctor, "find_tables", lambda kind: {})
    monkeypatch.setattr(doctor, "find_backends", lambda kind: [])
    for kind in ("cuda", "cpu"):
        monkeypatch.setattr(doctor, "find_device", lambda packages, kind=kind: ({"type": kind}, [first]))
        assert doctor.diagnose().problems == [first, second, third]
    assert seen == [("3.9.0", False), ("3.9.0", True)]
    assert doctor.run(SimpleNamespace(json=False)) == 1
    out = capsys.readouterr().out
    assert "Problems: 3" in out and all(
        f"{number}. problem {name}\n     fix: fix {name}" in out for number, name in zip("123", "abc", strict=True)
    )
    assert doctor.run(SimpleNamespace(json=True)) == 1
    assert [problem["what"] for problem in json.loads(capsys.readouterr().out)["problems"]] == [
        f"problem {name}" for name in "abc"
    ]


@pytest.mark.parametrize(
    ("implementations", "tested"),
    [
        (["triton", "flash_attn", "torch"], "triton"),
        (["reference", "reference"], "reference"),
        (["triton", "reference"], None),
        (["triton", None], None),
    ],
)
def test_the_self_test_runs_the_one_implementation_in_use(implementations, tested, monkeypatch):
    ran = []
    rows = [{"operator": f"op {index}", "implementation": impl, "why": ""} for index, impl in enumerate(implementations)]
    monkeypatch.setattr(doctor, "find_operators", lambda kind: (rows, []))
    monkeypatch.setattr(doctor, "self_test", lambda kind, impl: ran.append(impl) or ({}, []))
    doctor.diagnose()
    assert ran == ([tested] if tested else [])
