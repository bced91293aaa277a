"""Which implementation runs an operator: the `impl` argument, then `use_impl`, then KEYE_KERNELS_IMPL, then the device."""

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor

ENVIRONMENT_VARIABLE = "KEYE_KERNELS_IMPL"
# The names that each operator takes besides "auto". "torch" stands for torch's own library: its FlashAttention-2 in
# varlen_attention, its matmuls (cuBLAS or hipBLAS) in TORCH_MATMULS. "flash_attn" is the package of that name.
IMPLEMENTATIONS = {
    "add_norm": ("reference", "triton"),
    "cache_attention": ("reference", "triton"),
    "linear_few_rows": ("reference", "triton", "torch"),
    "patch_merge_projection": ("reference", "triton", "torch"),
    "position_embedding_2d": ("reference", "triton"),
    "rope_2d": ("reference", "triton"),
    "rope_3d": ("reference", "triton"),
    "rope_3d_to_cache": ("reference", "triton"),
    "silu_mul": ("reference", "triton"),
    "varlen_attention": ("reference", "triton", "torch", "flash_attn"),
}
TORCH_MATMULS = ("linear_few_rows", "patch_merge_projection")  # with "torch", these still run Triton kernels besides the matmuls
LIBRARY_OPERATORS = (*TORCH_MATMULS, "varlen_attention")  # on a GPU, "auto" may choose a library for a call of these
ALL_IMPLEMENTATIONS = ("auto", "reference", "triton", "torch", "flash_attn")

_default: ContextVar[str | None] = ContextVar("keye_kernels_impl", default=None)
_logger = logging.getLogger("keye_kernels")


@contextmanager
def use_impl(impl: str) -> Iterator[None]:
    """Makes `impl` the default of all operators that are called with impl="auto" inside the block.

    An operator that does not have the implementation ("flash_attn" is for attention only) chooses as with "auto".

    Args:
        impl: "auto", "reference", "triton", "torch" or "flash_attn".

    Raises:
        ValueError: unknown name.
    """
    check_impl(impl)
    token = _default.set(impl)
    try:
        yield
    finally:
        _default.reset(token)


def check_impl(impl: str, operator: str | None = None, name: str = "impl") -> None:
    """ValueError unless `impl` is a known name: of any operator, or of the given one."""
    known = ALL_IMPLEMENTATIONS if operator is None else ("auto", *IMPLEMENTATIONS[operator])
    if impl not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {impl!r}")


def impl_for(operator: str, impl: str) -> str:
    """What an operator gets from a model's `impl`: "auto" where the operator does not have that implementation."""
    return impl if impl in IMPLEMENTATIONS[operator] else "auto"


def resolve(impl: str, operator: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The implementation that runs `operator` on tensors of this device and dtype, "auto" replaced by a name.

    On a GPU, "auto" becomes "triton" (float64: "reference"). LIBRARY_OPERATORS choose a library later, by a timed table or their
    heuristic, and log it. Raises ValueError where an implementation that was asked for by name
    cannot run, TypeError where it does not take the dtype.
    """
    if impl == "auto":
        impl = impl_for(operator, default_impl())
    if impl == "auto":
        impl = "triton" if device.type == "cuda" and has_triton() and dtype != torch.float64 else "reference"
        if impl == "reference" or operator not in LIBRARY_OPERATORS:
            log_choice(operator, impl, device.type)
    if impl == "triton" or (impl == "torch" and operator in TORCH_MATMULS):
        _require_triton(impl, operator, device)
        if dtype == torch.float64:  # the kernels accumulate in float32
            types = "float32, float16 or bfloat16"
            raise TypeError(f"impl={impl!r} of {operator} takes {types} tensors, got {dtype}; use impl='reference'")
    return impl


def kernel_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a kernel gets `x`: Triton's interpreter multiplies the raw bits of bf16, and gets float32 instead."""
    return torch.float32 if x.dtype == torch.bfloat16 and x.device.type == "cpu" else x.dtype


def kernel_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors if tensors[0].device.type != "cpu" else tuple(x.to(kernel_dtype(x)) for x in tensors)


def is_auto(impl: str, operator: str) -> bool:
    """Whether neither the argument, `use_impl` nor the environment variable names an implementation of `operator`."""
    return impl == "auto" and impl_for(operator, default_impl()) == "auto"


def default_impl() -> str:
    """The name set by `use_impl`, or by the environment variable; "auto" where there is neither."""
    if (impl := _default.get()) is not None:
        return impl
    impl = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    check_impl(impl, name=f"the environment variable {ENVIRONMENT_VARIABLE}")
    return impl


@cache
def log_choice(operator: str, impl: str, where: str) -> None:
    """Logs what impl="auto" chose, once."""
    _logger.info("%s on %s runs impl=%r", operator, where, impl)


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _require_triton(impl: str, operator: str, device: torch.device) -> None:
    if not has_triton():
        raise ValueError(f"impl={impl!r} of {operator} needs Triton, which is not installed: pip install triton")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"impl={impl!r} of {operator} needs tensors on a CUDA or ROCm device, got {device}; on a CPU the kernels run only "
            "in Triton's (slow) interpreter: set TRITON_INTERPRET=1 before Python starts, or use impl='reference'"
        )
