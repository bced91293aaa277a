"""The built wheel: its contents, and the demo run from an environment where only the wheel is installed."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "keye_kernels"
BUILD_INPUTS = ("pyproject.toml", "setup.py", "README.md", "LICENSE")


def run(*command: str | Path, cwd: Path) -> str:
    """Runs a command outside the source tree, without settings of the test process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TRITON_", "KEYE_"))}
    result = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: a build in the source tree would also pack files that an earlier build left there."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(PACKAGE, source / "keye_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    for name in BUILD_INPUTS:
        shutil.copy(ROOT / name, source)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "dist")
    run(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The bin folder of a virtual environment with the wheel, which can also import the dependencies of this environment.

    The folder of the dependencies is listed in a .pth file. Python does not process the .pth files inside of that folder,
    so an editable install of the package there has no effect.
    """
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    dependencies = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site_packages / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    return folder / "bin"


def test_wheel_has_every_file_of_the_package_and_no_other(wheel):
    source = wheel.parents[1]
    files = {path.relative_to(source).as_posix() for path in (source / "keye_kernels").rglob("*") if path.is_file()}
    packed = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == files
    assert {"keye_kernels/py.typed", "keye_kernels/assets/small/model.safetensors"} <= packed


def test_installed_wheel_finds_its_data(installed, tmp_path):
    code = """
import json
from importlib.metadata import version
from importlib.resources import files

import keye_kernels
from keye_kernels.small import SMALL
from keye_kernels.triton.launch_config import PACKAGE_TABLES

package = files("keye_kernels")
print(json.dumps({
    "folder": str(package),
    "version": [version("keye_kernels"), keye_kernels.__version__],
    "py.typed": (package / "py.typed").is_file(),
    "small model": sorted(path.name for path in SMALL.iterdir()),
    "tables": sorted(path.name for path in PACKAGE_TABLES.glob("*.json")),
}))
"""
    found = json.loads(run(installed / "python", "-c", code, cwd=tmp_path))
    assert Path(found["folder"]).is_relative_to(installed.parent)
    assert found["version"][0] == found["version"][1]
    assert found["py.typed"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(found["small model"])
    assert found["tables"] == sorted(path.name for path in (PACKAGE / "triton" / "tables").glob("*.json")) != []


def test_demo_runs_from_the_installed_wheel(installed, tmp_path):
    questions = json.loads((PACKAGE / "assets" / "questions.json").read_text(encoding="utf-8"))
    output = run(installed / "keye-kernels", "demo", "--device", "cpu", cwd=tmp_path)
    right, total = map(int, re.search(r"(\d+) of (\d+) right", output).groups())
    assert right == total == sum(map(len, questions.values()))
    assert str(installed.parent) in output  # the paths of the image and the clip
