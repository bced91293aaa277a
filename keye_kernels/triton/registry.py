"""All kernels of this package, found by the names of the modules in this folder.

KERNEL_spec.py defines the `KernelSpec` SPEC of a kernel. KERNEL_cases.py defines the cases that verify its operator.
"""

import pkgutil
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cases import RunReference, VerifyCase
    from .spec import KernelSpec


def kernel_names() -> tuple[str, ...]:
    """The names of all kernels, sorted. Does not import Triton."""
    return _modules_with("_spec")


@cache
def kernel_spec(name: str) -> "KernelSpec":
    """The spec of one kernel. Raises ValueError for an unknown name."""
    if name not in kernel_names():
        raise ValueError(f"kernel must be one of {', '.join(kernel_names())}, got {name!r}")
    return import_module(f".{name}_spec", __package__).SPEC


def kernel_specs() -> "list[KernelSpec]":
    return [kernel_spec(name) for name in kernel_names()]


def verify_cases(real_sizes: bool, reference: "RunReference") -> "list[VerifyCase]":
    """The cases of all operators, at the sizes of Keye-VL-8B or at small ones. Does not import Triton."""
    modules = (import_module(f".{name}_cases", __package__) for name in _modules_with("_cases"))
    return [case for module in modules for case in module.verify_cases(real_sizes, reference)]


def _modules_with(suffix: str) -> tuple[str, ...]:
    modules = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return tuple(sorted(name.removesuffix(suffix) for name in modules if name.endswith(suffix)))
