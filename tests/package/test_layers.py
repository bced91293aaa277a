"""The layers of the package: what each folder and top-level module may import, including calls of registered operators."""

import ast
import sys
from pathlib import Path

import pytest

from tests.helpers.imports import OPERATORS, ROOT, defines_operators, imported_modules, modules_of

PACKAGE = ROOT / "keye_kernels"
# Lowest first. `torch.ops.keye_kernels.*` counts as an import of `ops`.
MAY_IMPORT = {
    "editions": set(),
    "host_copy": set(),
    "pixel_norm": set(),
    "plain": set(),
    "requirements": set(),
    "segments": {"host_copy"},
    "reference": set(),
    "triton": set(),
    "geometry": {"host_copy", "segments"},
    "ops": {"geometry", "reference", "segments", "triton"},
    "model": {"editions", "geometry", "host_copy", "ops", "pixel_norm", "plain", "segments"},
    "processing": {"editions", "host_copy", "pixel_norm"},
    "small": {"model", "processing"},
    "layers": {"geometry", "ops"},
    "warm_up": {"geometry", "model", "ops", "triton"},
    "integrations": {"editions", "geometry", "layers", "model", "ops", "plain", "processing", "requirements", "segments"},
    "auto": {"integrations"},
    "tools": {
        "auto",
        "editions",
        "geometry",
        "integrations",
        "model",
        "ops",
        "processing",
        "reference",
        "requirements",
        "segments",
        "small",
        "triton",
    },
    "cli": {"editions", "tools"},
}
# Folders that can be used without the rest of the package and of its dependencies
MAY_IMPORT_OUTSIDE = {"reference": {"torch"}, "triton": {"torch", "triton"}}


def files_by_layer() -> dict[str, list[Path]]:
    layers = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        layer = file.relative_to(PACKAGE).with_suffix("").parts[0]
        if not layer.startswith("__"):
            layers.setdefault(layer, []).append(file)
    return layers


def test_every_folder_and_module_is_a_layer():
    assert files_by_layer().keys() == MAY_IMPORT.keys()


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_imports_point_down(layer):
    for file in files_by_layer()[layer]:
        for module in imported_modules(file):
            top, _, rest = module.partition(".")
            name = rest.partition(".")[0]
            if top == "keye_kernels" and name in MAY_IMPORT and name != layer:
                assert name in MAY_IMPORT[layer], f"{file.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("layer", MAY_IMPORT_OUTSIDE)
def test_reference_and_triton_do_not_import_other_packages(layer):
    allowed = MAY_IMPORT_OUTSIDE[layer] | set(sys.stdlib_module_names) | {"keye_kernels"}
    for file in files_by_layer()[layer]:
        others = {module.partition(".")[0] for module in imported_modules(file)} - allowed
        assert not others, f"{file.relative_to(ROOT)} imports {', '.join(others)}"


def test_only_ops_registers_operators():
    assert {layer for layer, files in files_by_layer().items() if any(map(defines_operators, files))} == {"ops"}


@pytest.mark.parametrize(
    ("code", "is_call"),
    [
        ("torch.ops.keye_kernels.rope.default(q, k)", True),
        ("rope = torch.ops.keye_kernels.rope", True),
        ("getattr(torch.ops, NAMESPACE).rope(q, k)", True),
        ("from torch import ops\nops.keye_kernels.rope(q, k)", True),
        ("import torch.ops as operators", True),
        ("torch.ops.aten.gelu_(x)", False),
        ("getattr(torch, name)", False),
    ],
)
def test_calls_of_registered_operators_count_as_imports_of_ops(code, is_call):
    assert (OPERATORS in modules_of(ast.parse(code), ["keye_kernels"])) == is_call
