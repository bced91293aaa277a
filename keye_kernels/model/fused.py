"""What a layer computes between its matmuls, in fewer launches where Triton kernels run and no gradient is needed.

Elsewhere each function calls the modules: `torch.compile` fuses elementwise work without help, and a CPU gains nothing.
Symbols: T tokens or patches (or several axes, such as sequences and their tokens), C channels.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keye_kernels import ops
from keye_kernels.ops.implementation import impl_for, resolve
from keye_kernels.ops.linear_few_rows import prefers_triton
from keye_kernels.plain import PLAIN_TENSORS, calls_forward, has_plain_weights

from .linear import FusedLinear, Linear

QUICK_GELU = 1.702
# Layers whose weights are read. `patching` adds the RMSNorm classes of models that it knows.
FUSED_TYPES: set[type[nn.Module]] = {nn.LayerNorm, nn.RMSNorm, nn.Linear, Linear, FusedLinear}


def impl_for_layer(layer: nn.Module) -> str:
    """The `impl` of the functions below in a layer that transformers may checkpoint.

    Reentrant checkpointing runs a layer without gradients first, and must get the results of the second run with gradients.
    """
    return "reference" if layer.training and getattr(layer, "gradient_checkpointing", False) else "auto"


def norm(x: Tensor, module: nn.Module, impl: str = "auto") -> Tensor:
    """The LayerNorm or RMSNorm `module` of x [T, C]."""
    if _fuses(x, impl, module):
        return _shaped(ops.add_norm(_rows(x), None, **_norm_options(module), impl="triton")[1], x)
    return module(x)


def add_norm(x: Tensor, residual: Tensor, module: nn.Module, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """residual + x and its norm, [T, C]."""
    if _matches(residual, x) and _fuses(x, impl, module):
        total, normed = ops.add_norm(_rows(x), _rows(residual), **_norm_options(module), impl="triton")
        return _shaped(total, x), _shaped(normed, x)
    total = residual + x
    return total, module(total)


def silu_mul(gate: Tensor, up: Tensor, impl: str = "auto") -> Tensor:
    """silu(gate) * up. `gate` is overwritten when no gradient is needed: this is the largest activation of the decoder."""
    if _matches(up, gate) and _fuses(gate, impl):
        return _shaped(ops.silu_mul(_rows(gate), _rows(up), impl="triton"), gate)
    return F.silu(gate, inplace=not torch.is_grad_enabled()).mul_(up)


def linear(x: Tensor, module: nn.Linear, impl: str = "auto") -> Tensor:
    """module(x) for a linear layer with one output."""
    return _few_rows(x, module) if _runs_few_rows(x, module, impl) else module(x)


def split_linear(x: Tensor, module: FusedLinear, impl: str = "auto") -> tuple[Tensor, ...]:
    """module(x): each projection."""
    return _few_rows(x, module).split(module.sizes, dim=-1) if _runs_few_rows(x, module, impl) else module(x)


def linear_silu_mul(x: Tensor, module: FusedLinear, impl: str = "auto") -> Tensor:
    """silu(gate) * up of the two projections of `module`."""
    if _runs_few_rows(x, module, impl, silu_mul=True):
        return _few_rows(x, module, silu_mul=True)
    gate, up = module(x)
    return silu_mul(gate, up, impl)


def add_linear(x: Tensor, residual: Tensor, module: nn.Linear, impl: str = "auto") -> Tensor:
    """residual + module(x), for a linear layer without a bias. `residual` is overwritten where the matmul adds to it."""
    is_simple = module.bias is None and (residual.ndim == 2 or residual.is_contiguous())
    if is_simple and _fuses(x, impl, module) and x.dtype == residual.dtype:
        if _runs_few_rows(x, module, impl):
            return _few_rows(x, module, residual=_rows(residual))
        _rows(residual).addmm_(_rows(x), module.weight.t())
        return residual
    return residual + module(x)


def linear_gelu(x: Tensor, module: nn.Linear, impl: str = "auto") -> Tensor:
    """GELU, in its tanh form, of module(x)."""
    if _fuses(x, impl, module) and _has_epilogue(x, module.weight):
        return matmul_gelu(x, module.weight, module.bias)
    # In place when no gradient is needed and no hook may keep it: this is the largest activation of the tower
    in_place = not torch.is_grad_enabled() and calls_forward(module)
    return (torch.ops.aten.gelu_ if in_place else F.gelu)(module(x), approximate="tanh")


def quick_gelu_mlp(x: Tensor, fc1: nn.Linear, fc2: nn.Linear) -> Tensor | None:
    """fc2 of h · sigmoid(1.702 h), with h = fc1(x), or None where the modules must be called.

    h · sigmoid(a h) is silu(a h) / a: both factors go into the matmuls, and one pass over the activation remains.
    """
    if fc1.bias is None or fc2.bias is None or not _fuses(x, "auto", fc1, fc2):
        return None
    hidden = torch.addmm(fc1.bias * QUICK_GELU, _rows(x), fc1.weight.t(), alpha=QUICK_GELU)
    return _shaped(torch.addmm(fc2.bias, F.silu(hidden, inplace=True), fc2.weight.t(), alpha=1 / QUICK_GELU), x)


def has_gelu_epilogue(x: Tensor, weight: Tensor, impl: str = "auto") -> bool:
    """Whether `matmul_gelu` computes GELU in its tanh form, in one launch."""
    return _fuses(x, impl) and _has_epilogue(x, weight)


def matmul_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU of x @ weightᵀ + bias, in the epilogue of the matmul."""
    return _shaped(torch._addmm_activation(bias, _rows(x), weight.t(), use_gelu=True), x)


def _runs_few_rows(x: Tensor, module: nn.Linear, impl: str, silu_mul: bool = False) -> bool:
    """Whether a table of launch configs says that the kernel for few rows is faster than torch's matmul."""
    return _fuses(x, impl, module) and prefers_triton(_rows(x), module.weight, silu_mul)


def _few_rows(x: Tensor, module: nn.Linear, **options: Any) -> Tensor:
    return _shaped(ops.linear_few_rows(_rows(x), module.weight, module.bias, **options, impl="triton"), x)


def _fuses(x: Tensor, impl: str, *modules: nn.Module) -> bool:
    if not all(type(module) in FUSED_TYPES and calls_forward(module) and has_plain_weights(module) for module in modules):
        return False
    if any(module.weight is None or module.weight.dtype != x.dtype for module in modules):
        return False  # without a weight, or with a dtype in which some classes return their result
    return runs_kernels(x, impl)


def runs_kernels(x: Tensor, impl: str) -> bool:
    """Whether Triton kernels run on `x`, without gradients, autocast and compilation."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return False
    if type(x) not in PLAIN_TENSORS or x.stride(-1) != 1:
        return False
    return x.dtype != torch.float64 and resolve(impl_for("add_norm", impl), "add_norm", x.device, x.dtype) == "triton"


def _matches(other: Tensor, x: Tensor) -> bool:
    """Whether a kernel takes `other` together with x; modules of other code may return any layout and dtype."""
    return other.dtype == x.dtype and other.stride(-1) == 1 and type(other) in PLAIN_TENSORS


def _rows(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def _shaped(rows: Tensor, x: Tensor) -> Tensor:
    """The rows [T, ...] with the leading axes of x."""
    return rows if x.ndim == 2 else rows.view(*x.shape[:-1], -1)


def _norm_options(module: nn.Module) -> dict[str, Any]:
    eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
    return {"weight": module.weight, "bias": getattr(module, "bias", None), "eps": eps}  # an RMSNorm has no bias


def _has_epilogue(x: Tensor, weight: Tensor) -> bool:
    return x.is_cuda and x.dtype == weight.dtype and _epilogue_is_tanh(x.device)


@cache
def _epilogue_is_tanh(device: torch.device) -> bool:
    """Whether the GELU in the epilogue of the library's matmul is the tanh form, which cuBLASLt has and others may not."""
    x = torch.linspace(-4, 4, 64, device=device)
    found = torch._addmm_activation(torch.zeros(64, device=device), torch.eye(64, device=device), x.diag(), use_gelu=True).diag()
    # Float32 matmuls may run in TF32; the two forms differ by up to 5e-4
    errors = [(found - F.gelu(x, approximate=form)).abs().max() for form in ("tanh", "none")]
    return bool(errors[0] < errors[1])
