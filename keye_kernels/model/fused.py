"""What a layer computes between its matmuls, in fewer launches where Triton kernels run and no gradient is needed.

Elsewhere each function calls the modules: `torch.compile` fuses elementwise work without help, and a CPU gains nothing.
Symbols: T tokens or patches, C channels.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keye_kernels import ops
from keye_kernels.ops.implementation import impl_for, resolve
from keye_kernels.plain import calls_forward

from .linear import Linear

FUSED_TYPES = (nn.LayerNorm, nn.RMSNorm, nn.Linear, Linear)


def norm(x: Tensor, module: nn.Module, impl: str = "auto") -> Tensor:
    """The LayerNorm or RMSNorm `module` of x [T, C]."""
    if _fuses(x, impl, module):
        return ops.add_norm(x, None, **_norm_options(module), impl="triton")[1]
    return module(x)


def add_norm(x: Tensor, residual: Tensor, module: nn.Module, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """residual + x and its norm, [T, C]."""
    if _fuses(x, impl, module):
        return ops.add_norm(x, residual, **_norm_options(module), impl="triton")
    total = residual + x
    return total, module(total)


def silu_mul(gate: Tensor, up: Tensor, impl: str = "auto") -> Tensor:
    """silu(gate) * up. `gate` is overwritten when no gradient is needed: this is the largest activation of the decoder."""
    if _fuses(gate, impl):
        return ops.silu_mul(gate, up, impl="triton")
    return F.silu(gate, inplace=not torch.is_grad_enabled()).mul_(up)


def add_linear(x: Tensor, residual: Tensor, module: nn.Linear, impl: str = "auto") -> Tensor:
    """residual + module(x), for a linear layer without a bias. `residual` is overwritten where the matmul adds to it."""
    if module.bias is None and _fuses(x, impl, module) and x.dtype == residual.dtype == module.weight.dtype:
        return residual.addmm_(x, module.weight.t())
    return residual + module(x)


def linear_gelu(x: Tensor, module: nn.Linear, impl: str = "auto") -> Tensor:
    """GELU, in its tanh form, of module(x)."""
    if _fuses(x, impl, module) and has_gelu_epilogue(x, module.weight, impl):
        return matmul_gelu(x, module.weight, module.bias)
    # In place when no gradient is needed: this is the largest activation of the tower
    return (F.gelu if torch.is_grad_enabled() else torch.ops.aten.gelu_)(module(x), approximate="tanh")


def has_gelu_epilogue(x: Tensor, weight: Tensor, impl: str = "auto") -> bool:
    """Whether `matmul_gelu` computes GELU in its tanh form, in one launch."""
    return _fuses(x, impl) and x.is_cuda and x.dtype == weight.dtype and _epilogue_is_tanh(x.device)


def matmul_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU of x @ weightᵀ + bias, in the epilogue of the matmul."""
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)


def _fuses(x: Tensor, impl: str, *modules: nn.Module) -> bool:
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return False
    if not all(type(module) in FUSED_TYPES and calls_forward(module) for module in modules):
        return False
    return x.dtype != torch.float64 and resolve(impl_for("add_norm", impl), "add_norm", x.device, x.dtype) == "triton"


def _norm_options(module: nn.Module) -> dict[str, Any]:
    return {"weight": module.weight, "bias": getattr(module, "bias", None), "eps": module.eps}  # an RMSNorm has no bias


@cache
def _epilogue_is_tanh(device: torch.device) -> bool:
    """Whether the GELU in the epilogue of the library's matmul is the tanh form, which cuBLASLt has and others may not."""
    x = torch.linspace(-4, 4, 64, device=device)
    found = torch._addmm_activation(torch.zeros(64, device=device), torch.eye(64, device=device), x.diag(), use_gelu=True).diag()
    # Float32 matmuls may run in TF32; the two forms differ by up to 5e-4
    errors = [(found - F.gelu(x, approximate=form)).abs().max() for form in ("tanh", "none")]
    return bool(errors[0] < errors[1])
