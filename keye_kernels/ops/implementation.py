"""Which implementation serves an operator: the argument, then `use_impl`, then KEYE_KERNELS_IMPL, then what the device offers."""

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

IMPLEMENTATIONS = ("auto", "reference", "triton", "flash_attn")
ENVIRONMENT_VARIABLE = "KEYE_KERNELS_IMPL"

_chosen: ContextVar[str | None] = ContextVar("keye_kernels_impl", default=None)
_logged: set[tuple[str, str, str]] = set()
_logger = logging.getLogger("keye_kernels")


@contextmanager
def use_impl(impl: str) -> Iterator[None]:
    """Makes `impl` the default of every operator called with impl="auto" inside the block.

    "flash_attn" is for attention; the other operators then choose as "auto" does.
    """
    check_impl(impl)
    token = _chosen.set(impl)
    try:
        yield
    finally:
        _chosen.reset(token)


def check_impl(impl: str, *, name: str = "impl", attention: bool = True) -> None:
    """ValueError unless `impl` is a known name (of an operator other than attention, without "flash_attn")."""
    known = IMPLEMENTATIONS if attention else IMPLEMENTATIONS[:-1]
    if impl not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {impl!r}")


def impl_outside_attention(impl: str) -> str:
    """What the operators other than attention take where a model is given `impl`: "flash_attn" serves attention only."""
    return "auto" if impl == "flash_attn" else impl


def resolve(impl: str, operator: str, device: torch.device) -> str:
    """The implementation that runs `operator` on `device` now. Raises ValueError where one asked for by name cannot."""
    if impl == "auto":
        impl = _chosen.get() or os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
        check_impl(impl, name=f"the environment variable {ENVIRONMENT_VARIABLE}")
        if impl == "flash_attn" and operator != "varlen_attention":
            impl = "auto"
    if impl == "auto":
        impl = "triton" if device.type == "cuda" and importlib.util.find_spec("triton") else "reference"
        if (operator, impl, device.type) not in _logged:
            _logged.add((operator, impl, device.type))
            _logger.info("%s on %s runs the %s implementation", operator, device.type, impl)
    if impl == "triton":
        _require_triton(operator, device)
    return impl


def _require_triton(operator: str, device: torch.device) -> None:
    if importlib.util.find_spec("triton") is None:
        raise ValueError(f"impl='triton' of {operator} needs Triton, which is not installed: pip install triton")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"impl='triton' of {operator} needs tensors on a CUDA or ROCm device, got {device}; on a CPU the kernels run only "
            "in Triton's (slow) interpreter: set TRITON_INTERPRET=1 before Python starts, or use impl='reference'"
        )
