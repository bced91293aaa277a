"""The registry: every kernel has a spec, every operator has verify cases, and signatures and configs match the kernels."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import triton.language as tl

from keye_kernels import triton as folder
from keye_kernels.ops.implementation import IMPLEMENTATIONS
from keye_kernels.tools.compile import ARGUMENT_TYPE
from keye_kernels.tools.verify.checks import run_reference
from keye_kernels.triton.device import INTERPRETER_ARCH, MULTIPROCESSORS, Arch
from keye_kernels.triton.registry import kernel_names, kernel_spec, kernel_specs, verify_cases
from keye_kernels.triton.spec import TORCH_DTYPES

ARCHITECTURES = [Arch(name) for name in MULTIPROCESSORS]
WORKLOAD = {"images": [[1, 16], [3, 4096]], "frames": [[8, 400]], "prompts": [[2, 3000]], "decode": [1, 64]}
NAMES = pytest.mark.parametrize("name", kernel_names())


def launched_functions():
    """The names of the JIT functions that are wrapped in `Kernel(...)` anywhere in the folder."""
    found = []
    for file in Path(folder.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Kernel":
                found.append(ast.unparse(node.args[0]))
    return sorted(found)


def uses(spec):
    """(shape, dtype, architecture, heuristic config) of every part, dtype and architecture."""
    for shape in spec.shapes(WORKLOAD):
        for dtype in TORCH_DTYPES:
            for arch in ARCHITECTURES:
                yield shape, dtype, arch, spec.heuristic(shape, dtype, arch)


def test_every_launched_kernel_has_one_spec():
    variants = [spec.shipped_variants(INTERPRETER_ARCH) for spec in kernel_specs()]
    compiled = [name for of_spec in variants for name in {variant.kernel.__name__ for variant in of_spec}]
    assert sorted(compiled) == launched_functions() and all(variants)
    assert [spec.name for spec in kernel_specs()] == list(kernel_names())


def test_an_unknown_kernel_raises():
    with pytest.raises(ValueError, match=r"kernel must be one of add_norm, .*, got 'softmax'"):
        kernel_spec("softmax")


@pytest.mark.parametrize("real_sizes", [False, True], ids=["small", "real"])
def test_verify_cases_cover_every_operator(real_sizes):
    cases = verify_cases(real_sizes, run_reference)
    assert {case.operator for case in cases} == IMPLEMENTATIONS.keys()
    assert len({(case.operator, case.label) for case in cases}) == len(cases)


def test_names_and_cases_do_not_import_triton():
    code = """
import sys
from keye_kernels.tools.verify.checks import run_reference
from keye_kernels.triton import cases, registry
assert registry.kernel_names() and registry.verify_cases(True, run_reference)
assert "triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


@NAMES
def test_candidates_change_fields_of_the_heuristic_only(name):
    spec = kernel_spec(name)
    for shape, dtype, arch, heuristic in uses(spec):
        candidates = spec.candidates(shape, arch, heuristic)
        changes = [*candidates, *spec.refinements(heuristic)]
        assert candidates, (shape, dtype, arch)
        for config in (heuristic | change for change in changes):
            assert config.keys() == heuristic.keys()
            assert all(type(config[field]) is type(value) for field, value in heuristic.items())
        assert set(spec.fields_shared_by_buckets) <= heuristic.keys()


@NAMES
def test_use_tma_is_tried_only_where_there_is_tma(name):
    spec = kernel_spec(name)
    for shape, _, arch, heuristic in uses(spec):
        assert not heuristic.get("use_tma")
        tried = {candidate.get("use_tma", False) for candidate in spec.candidates(shape, arch, heuristic)}
        assert arch.has_tma or not any(tried)


def assert_signature_fits(variant):
    """Every parameter has an argument type, None, or (a constexpr) a value, as `triton.compile` needs it."""
    assert set(variant.signature) == set(variant.kernel.arg_names), variant.label
    for parameter in inspect.signature(variant.kernel.fn).parameters.values():
        value = variant.signature[parameter.name]
        is_type = isinstance(value, str) and ARGUMENT_TYPE.fullmatch(value) is not None
        if parameter.annotation is tl.constexpr:
            assert value is not None and not is_type, (variant.label, parameter.name)
        else:
            assert value is None or is_type, (variant.label, parameter.name)


@NAMES
def test_variants_name_every_parameter_of_the_kernel(name):
    spec = kernel_spec(name)
    for shape, dtype, arch, heuristic in uses(spec):
        changes = [{"backend": "triton"}] if "backend" in heuristic else [{}]
        changes += [changes[0] | {"use_tma": True}] if "use_tma" in heuristic else []
        for change in changes:
            variants = spec.variants(shape.part, dtype, arch, heuristic | change)
            assert variants
            for variant in variants:
                assert_signature_fits(variant)
                uses_descriptors = any(str(value).startswith("tensordesc") for value in variant.signature.values())
                assert uses_descriptors == change.get("use_tma", False)
        if "backend" in heuristic:
            assert spec.variants(shape.part, dtype, arch, heuristic | {"backend": "torch"}) == []


@NAMES
@pytest.mark.parametrize("arch", ARCHITECTURES, ids=lambda arch: arch.name)
def test_shipped_variants_have_unique_labels_and_complete_signatures(name, arch):
    variants = kernel_spec(name).shipped_variants(arch)
    assert len({variant.label for variant in variants}) == len(variants) > 0
    for variant in variants:
        assert_signature_fits(variant)


@NAMES
def test_a_config_key_gives_the_part_of_its_shape(name):
    spec = kernel_spec(name)
    for shape, dtype, _, _ in uses(spec):
        assert spec.part_of(spec.config_key(shape, dtype)) == shape.part


@NAMES
def test_a_workload_has_shapes_of_the_kernel(name):
    shapes = kernel_spec(name).shapes(WORKLOAD)
    assert shapes and {shape.kernel for shape in shapes} == {name}
    assert kernel_spec(name).shapes({}) == []


def test_architectures():
    wgmma = [arch.name for arch in ARCHITECTURES if arch.has_wgmma]
    tcgen05 = [arch.name for arch in ARCHITECTURES if arch.has_tcgen05]
    assert wgmma == ["sm_90"] and tcgen05 == ["sm_100"]
    amd = Arch("gfx942")
    assert (amd.is_nvidia, amd.capability, amd.warp_size, amd.has_tma) == (False, 0, 64, False)
    assert (Arch("sm_120").is_nvidia, Arch("sm_120").capability, Arch("sm_120").warp_size) == (True, 120, 32)
