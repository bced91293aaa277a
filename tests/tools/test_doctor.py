"""`doctor`: it never crashes, says what is wrong, and finds pairs of incompatible versions."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from keye_kernels import reference
from keye_kernels.tools import doctor
from keye_kernels.tools.doctor import machine
from keye_kernels.tools.doctor.versions import PACKAGES, REQUIRED, Package, version_problems
from keye_kernels.triton import device, launch_config, varlen_attention

GOOD = {"torch": "2.13.0+cu130", "triton": "3.9.0", "numpy": "2.3.5", "transformers": "5.23.0"}
OPERATORS = [
    "add_norm", "cache_attention", "linear_few_rows", "patch_merge_projection", "position_embedding_2d", "rope_2d", "rope_3d",
    "rope_3d_to_cache", "silu_mul", "varlen_attention",
]  # fmt: skip


def run_doctor(*missing, path=""):
    """Runs the command in a new process in which the packages `missing` cannot be imported. Returns its JSON."""
    code = f"import sys; sys.modules.update(dict.fromkeys({missing!r}))\n"
    code += "from keye_kernels.cli import main; raise SystemExit(main(['doctor', '--json']))"
    env = {**os.environ, "PYTHONPATH": str(path), "TRITON_INTERPRET": "0"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False, env=env)
    assert "Traceback" not in result.stderr, result.stderr
    found = json.loads(result.stdout)
    assert result.returncode == (1 if found["problems"] else 0)
    return found


def problems(versions, pinned_triton=None, **errors):
    versions = dict.fromkeys(REQUIRED, "99.0") | versions
    packages = {name: Package(versions.get(name), errors.get(name)) for name in PACKAGES}
    return [(problem.what, problem.fix) for problem in version_problems(packages, pinned_triton)]


def test_without_triton_and_transformers_the_reference_runs_and_no_problem_is_found():
    found = run_doctor("triton", "transformers", "flash_attn", "torchvision")
    assert found["versions"]["triton"] == found["versions"]["transformers"] == "not installed"
    assert [(row["operator"], row["implementation"]) for row in found["operators"]] == [(name, "reference") for name in OPERATORS]
    assert found["self_test"]["operators"] == len(OPERATORS) and found["self_test"]["failed"] == []
    assert not [problem for problem in found["problems"] if "vllm" not in problem["what"]]


@pytest.mark.parametrize("error", ["RuntimeError('built for another torch')", "SystemExit(3)"])
def test_a_broken_flash_attn_is_named_with_its_fix(error, tmp_path):
    (tmp_path / "flash_attn.py").write_text(f"raise {error}")
    found = run_doctor("transformers", path=tmp_path)
    assert error.split("(")[0] in found["versions"]["flash_attn"]
    [problem] = [problem for problem in found["problems"] if "flash_attn" in problem["what"]]
    assert "pip uninstall -y flash-attn" in problem["fix"]
    assert found["self_test"]["failed"] == []


def test_without_torch_it_says_so():
    found = run_doctor("torch", "transformers", "torchvision", "flash_attn")
    assert {"what": "torch is not installed", "fix": 'pip install "torch>=2.6"'} in found["problems"]
    assert found["operators"] == []


def test_compatible_versions_are_no_problem():
    assert problems(GOOD, "3.9.0") == []
    assert problems({**GOOD, "transformers": None, "kernels": "0.17.0", "torch": "2.6.0", "triton": "3.4.0"}) == []


@pytest.mark.parametrize(
    ("versions", "pinned", "what", "fix"),
    [
        ({"torch": "2.5.1"}, None, "torch 2.5.1 is older", 'pip install -U "torch>=2.6"'),
        ({"triton": "3.3.1"}, "3.3.1", "Triton 3.3.1 is older", 'pip install -U "torch>=2.8"'),
        ({"triton": "3.2.0"}, None, "Triton 3.2.0 is older", 'pip install -U "triton>=3.4"'),
        ({"triton": "3.9.0"}, "3.8.0", "built for Triton 3.8.0, but 3.9.0", "pip install triton==3.8.0"),
        ({"transformers": "4.56.2"}, None, "not in the supported range", 'pip install "transformers>=4.57,<5.24"'),
        ({"transformers": "5.24.0"}, None, "not in the supported range", 'pip install "transformers>=4.57,<5.24"'),
        ({"vllm": "0.32.0"}, None, "vllm 0.32.0 does not work", 'pip install "transformers>=4.57,<5.20"'),
        ({"vllm": "0.19.1", "transformers": "5.19.0"}, None, "older than 0.32", 'pip install -U "vllm>=0.32"'),
        ({"kernels": "0.18.1"}, None, "kernels 0.18.1 fails", 'pip install -U "kernels>=0.18.2"'),
        (
            {"triton": "3.6.0", "numpy": "2.4.0"},
            None,
            "interpreter of Triton 3.6.0 fails with numpy 2.4.0",
            'pip install "numpy<2.4"',
        ),
        ({"torch": None}, None, "torch is not installed", 'pip install "torch>=2.6"'),
        ({"PIL": None}, None, "PIL is not installed", "pip install pillow"),
    ],
)
def test_incompatible_versions_are_named_with_the_command_that_fixes_them(versions, pinned, what, fix):
    [(found, command)] = problems({**GOOD, **versions}, pinned)
    assert what in found and command == fix


def test_a_torchvision_that_cannot_be_imported_is_a_problem():
    [(what, fix)] = problems({**GOOD, "torchvision": "0.28.0"}, torchvision="RuntimeError: operator torchvision::nms")
    assert "torchvision 0.28.0, cannot be imported (RuntimeError" in what and "pip uninstall -y torchvision" in fix


def test_a_wrong_operator_fails_the_self_test(monkeypatch):
    projection = reference.patch_merge_projection
    monkeypatch.setattr(reference, "patch_merge_projection", lambda *inputs: projection(*inputs) + 1e-3)
    found, broken = machine.self_test("cpu", "reference")
    assert found["failed"] == ["patch_merge_projection"]
    assert "patch_merge_projection is wrong" in broken[0].what and "keye-kernels verify" in broken[0].fix


def test_a_probe_that_raises_does_not_end_the_diagnosis(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no idea")

    for name in ("find_device", "find_operators", "find_tables"):
        monkeypatch.setattr(doctor, name, broken)
    monkeypatch.setattr(doctor, "torchs_triton", broken)
    assert doctor.run(SimpleNamespace(json=False)) == 1
    assert capsys.readouterr().out.count("RuntimeError: no idea") == 3


def test_an_implementation_that_cannot_run_is_a_problem(monkeypatch):
    monkeypatch.setenv("KEYE_KERNELS_IMPL", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    rows, found = machine.find_operators("cpu")
    assert {row["implementation"] for row in rows} == {None} and len(found) == len(OPERATORS)
    assert found[0].fix == "unset KEYE_KERNELS_IMPL"


def test_a_driver_with_a_torch_that_finds_no_gpu_is_a_problem(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 580.65.06\necho 580.65.06\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found, [problem] = machine.find_device({"torch": Package("2.13.0")})
    assert found["driver"] == "580.65.06" and "finds no GPU" in problem.what and "torch" in problem.fix


@pytest.fixture
def gpu(monkeypatch):
    """Properties that torch reports on a machine with an H100."""
    properties = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    return properties


def test_a_gpu_is_described(gpu, monkeypatch):
    monkeypatch.setenv("CC", "gcc")
    found, broken = machine.find_device({"torch": Package("2.13.0"), "triton": Package("3.9.0")})
    assert (found["name"], found["capability"], found["memory_gib"]) == ("NVIDIA H100", "9.0", 80.0) and broken == []


def test_everything_that_prevents_kernels_on_a_gpu_is_a_problem(gpu, monkeypatch):
    gpu.major, gpu.minor = 7, 5
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    _, broken = machine.find_device({"torch": Package("2.13.0"), "triton": Package(None)})
    text = " ".join(problem.what for problem in broken)
    assert len(broken) == 4 and all(part in text for part in ("no Triton", "TRITON_INTERPRET", "C compiler", "7.5"))


@pytest.fixture
def h100(gpu, monkeypatch, tmp_path):
    """The path of the first launch-config table that a launch on the H100 looks for. It does not exist yet."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu.name)
    monkeypatch.setenv("KEYE_KERNELS_TILES", str(tmp_path / "named"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    for function in (device.device_name, device.device_arch):
        function.cache_clear()
    launch_config.clear_cache()
    yield tmp_path / "named" / "NVIDIA_H100.json"
    for function in (device.device_name, device.device_arch):
        function.cache_clear()
    launch_config.clear_cache()


def test_the_launch_config_table_in_effect_is_named(h100, monkeypatch):
    sibling = machine.find_tables("cuda")
    assert sibling["table"].endswith("NVIDIA_H200.json") and "measured on another GPU with the same chip" in sibling["note"]
    monkeypatch.setattr(launch_config, "PACKAGE_TABLES", h100.parent)
    assert str(h100) in machine.find_tables("cuda")["note"] and "heuristics" in machine.find_tables("cuda")["note"]
    h100.parent.mkdir()
    h100.write_text(json.dumps({"triton": "3.9.0", "kernels": {"rope": [], "linear": []}}))
    assert machine.find_tables("cuda") == {"table": str(h100), "triton": "3.9.0", "kernels": "linear, rope"}
    h100.write_text('{"kernels": ')
    assert "ignored: JSONDecodeError" in machine.find_tables("cuda")["error"]


def test_the_backends_of_impl_auto_are_shown(h100):
    rows = machine.find_backends("cuda")
    assert {(row["kernel"], row["backend"]) for row in rows} == {
        ("linear", "torch"), ("linear_few_rows", "torch"), ("varlen_attention", "triton")
    }  # fmt: skip
    key = varlen_attention.config_key(torch.bfloat16, 72, 1024, False)
    h100.parent.mkdir()
    entry = {**key, "config": {"backend": "torch"}, "median_us": 1.0}
    h100.write_text(json.dumps({"triton": "3.9.0", "kernels": {"varlen_attention": [entry]}}))
    launch_config.clear_cache()
    by_use = {row["use"]: row["backend"] for row in machine.find_backends("cuda") if row["kernel"] == "varlen_attention"}
    assert by_use["vision, 1 x 1024"] == "torch" and by_use["text, 1 x 1024"] == "triton"
    text = doctor.to_text(doctor.Diagnosis(backends=machine.find_backends("cuda")))
    assert "varlen_attention         vision, 1 x 1024: torch" in text
    assert machine.find_backends("cpu") == []


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_implementation_names_the_backend_of_the_matmuls(backend, h100, monkeypatch):
    monkeypatch.setattr(doctor, "find_device", lambda packages: ({"type": "cuda"}, []))
    monkeypatch.setattr(
        doctor, "self_test", lambda device, impl: ({"implementation": impl, "operators": 5, "failed": [], "seconds": 0}, [])
    )
    linear = {"kernel": "linear", "use": "linear_1, 1 x 256", "backend": backend}
    few_rows = [{"kernel": "linear_few_rows", "use": "o 1 rows, 1 x 1", "backend": name} for name in ("torch", "triton")]
    monkeypatch.setattr(doctor, "find_backends", lambda device: [linear, *few_rows])
    found = doctor.diagnose()
    implementations = {row["operator"]: row["implementation"] for row in found.operators}
    projector = "triton, matmuls: torch" if backend == "torch" else "triton"
    assert implementations.pop("patch_merge_projection") == projector
    assert implementations.pop("linear_few_rows") == "triton, matmuls: torch or triton"
    assert set(implementations.values()) == {"triton"} and found.self_test["implementation"] == "triton"
    assert f"patch_merge_projection   {projector} (" in doctor.to_text(found)
