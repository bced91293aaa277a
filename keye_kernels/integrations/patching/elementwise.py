"""The residual adds, norms and activations of loaded models in fewer launches: conditions, and the forwards that replace them.

The forwards call `keye_kernels.model.fused`, which reads the weights of plain modules where Triton kernels run and no gradient is
needed, and calls the modules everywhere else. They are named `forward`, as all in `forwards`.
"""

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keye_kernels.model import fused
from keye_kernels.plain import calls_forward, is_plain

from .forwards import as_forward

RMS_NORM_NAMES = {"dtype", "to", "torch", "float32", "pow", "mean", "rsqrt", "variance_epsilon", "weight"}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "GELU in its tanh form": lambda x: F.gelu(x, approximate="tanh"),
    "QuickGELU": lambda x: x * torch.sigmoid(fused.QUICK_GELU * x),
    "SiLU": F.silu,
}


def uses_only(module: nn.Module, names: set[str]) -> bool:
    """Whether the forward of the class uses exactly these attributes and globals, and no number: its source is the known one."""
    forward: Any = type(module).forward
    if getattr(forward, "__code__", None) and forward.__code__.co_name == "forward_with_checkpointing":
        forward = forward.__wrapped__  # transformers wraps the forwards of layers; see `layer_forward`
    if not isinstance(forward, FunctionType) or forward.__closure__:
        return False
    return set(forward.__code__.co_names) == names and not any(type(value) is float for value in forward.__code__.co_consts)


def layer_obstacle(names: tuple[str, str, str, str], module: nn.Module, part: str) -> str | None:
    """`names`: the submodules first norm, attention, second norm and MLP."""
    if absent := [name for name in names if not isinstance(getattr(module, name, None), nn.Module)]:
        return f"it has no {', '.join(absent)} in this version"
    if not uses_only(module, set(names)):
        return f"the forward of its class is not norm, attention, add, norm, {names[3]}, add in this version"
    for name in names[::2]:
        if not is_known_norm(module.get_submodule(name)):
            return f"its {name} is a {type(module.get_submodule(name)).__name__}, not a known LayerNorm or RMSNorm"
    return None


def is_known_norm(norm: nn.Module) -> bool:
    """Whether add_norm computes this norm. The RMSNorm classes of transformers, which have the same source, are registered."""
    if type(norm) in (nn.LayerNorm, nn.RMSNorm) or type(norm) in fused.FUSED_TYPES:
        return True
    if not type(norm).__name__.endswith("RMSNorm") or not hasattr(norm, "variance_epsilon"):
        return False
    is_known = uses_only(norm, RMS_NORM_NAMES)
    if is_known:
        fused.FUSED_TYPES.add(type(norm))
    return is_known


def mlp_obstacle(names: tuple[str, ...], activation: str, module: nn.Module, part: str) -> str | None:
    """`names`: the linear layers; `activation`: the attribute of the activation."""
    if absent := [name for name in (*names, activation) if not isinstance(getattr(module, name, None), nn.Module)]:
        return f"it has no {', '.join(absent)} in this version"
    if not uses_only(module, {*names, activation}):
        return f"the forward of its class does more than apply {', '.join(names)} and {activation} in this version"
    expected = ("SiLU",) if len(names) == 3 else ("GELU in its tanh form", "QuickGELU")
    if activation_kind(getattr(module, activation)) not in expected:
        return f"its activation {type(getattr(module, activation)).__name__} is not {' or '.join(expected)}"
    return None


def activation_kind(activation: nn.Module) -> str | None:
    """The name in ACTIVATIONS of what a module computes."""
    x = torch.linspace(-3, 3, 13)
    found = activation(x.clone())
    return next((name for name, function in ACTIVATIONS.items() if torch.allclose(found, function(x), atol=1e-6)), None)


def layer_forward(names: tuple[str, str, str, str], returns_weights: bool) -> Callable:
    """The forward of a layer; `returns_weights`: its attention returns a tuple of output and weights."""
    norm_1, attention, norm_2, mlp = names

    def forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Recent versions of transformers checkpoint in the forward of the class
        if args or (self.training and getattr(self, "gradient_checkpointing", False)):
            return type(self).forward(self, hidden_states, *args, **kwargs)
        attended = getattr(self, attention)(fused.norm(hidden_states, getattr(self, norm_1)), **kwargs)
        attended = attended[0] if returns_weights else attended
        hidden_states, normed = fused.add_norm(attended, hidden_states, getattr(self, norm_2))
        return hidden_states + getattr(self, mlp)(normed)

    return forward


@as_forward
def keye_layer(
    self: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None, output_attentions: bool = False, **kwargs: Any
) -> tuple[Tensor, ...]:
    """Keye's `SiglipEncoderLayer`."""
    kwargs |= {"attention_mask": attention_mask, "output_attentions": output_attentions}
    impl = fused.impl_for_layer(self)
    attended, weights = self.self_attn(hidden_states=fused.norm(hidden_states, self.layer_norm1, impl), **kwargs)
    hidden_states, normed = fused.add_norm(attended, hidden_states, self.layer_norm2, impl)
    hidden_states = hidden_states + self.mlp(normed)
    return (hidden_states, weights) if output_attentions else (hidden_states,)


def mlp_forward(names: tuple[str, ...], activation: str, module: nn.Module, parts: frozenset) -> Callable:
    kind = activation_kind(getattr(module, activation))
    make = {"GELU in its tanh form": gelu_mlp, "QuickGELU": quick_gelu_mlp, "SiLU": silu_mlp}[str(kind)]
    return make(names, activation, type(getattr(module, activation)))


def is_unchanged(activation: nn.Module, kind: type) -> bool:
    """Whether the activation is still the one that was there when its MLP was patched, without hooks."""
    return type(activation) is kind and calls_forward(activation)


@cache
def gelu_mlp(names: tuple[str, str], activation: str, kind: type) -> Callable:
    fc1, fc2 = names

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if not is_unchanged(getattr(self, activation), kind):
            return type(self).forward(self, x)
        return getattr(self, fc2)(fused.linear_gelu(x, getattr(self, fc1)))

    return forward


@cache
def quick_gelu_mlp(names: tuple[str, str], activation: str, kind: type) -> Callable:
    fc1, fc2 = names

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        is_known = is_unchanged(getattr(self, activation), kind)
        out = fused.quick_gelu_mlp(x, getattr(self, fc1), getattr(self, fc2)) if is_known else None
        return type(self).forward(self, x) if out is None else out

    return forward


@cache
def silu_mlp(names: tuple[str, str, str], activation: str, kind: type) -> Callable:
    gate_proj, up_proj, down_proj = names

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        # `fused.silu_mul` may overwrite the gate, which a hook could keep
        if not is_unchanged(getattr(self, activation), kind) or not is_plain(getattr(self, gate_proj)):
            return type(self).forward(self, x)
        return getattr(self, down_proj)(fused.silu_mul(getattr(self, gate_proj)(x), getattr(self, up_proj)(x)))

    return forward
