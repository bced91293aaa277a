"""Registers operators with torch.library: schema, CPU and CUDA/ROCm implementation, fake, autograd."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

NAMESPACE = "keye_kernels"
DEVICE_KEYS = ("CPU", "CUDA")  # ROCm builds of torch also use the CUDA dispatch key

library = torch.library.Library(NAMESPACE, "DEF")


def define(name: str, arguments: str, returns: str, run: Callable, fake: Callable) -> None:
    """Registers `name(arguments) -> returns`. `run` computes it and `fake` its output shapes, with the schema's arguments."""
    library.define(f"{name}({arguments}) -> {returns}")
    for key in DEVICE_KEYS:
        library.impl(name, run, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)


def call(operator: Callable, *arguments: Any) -> Any:
    """`operator(*arguments)`. Without gradients it skips the autograd dispatch key, whose Python fallback is as slow as a launch.

    Raises NotImplementedError for arguments with a forward-mode tangent, which torch.library would drop.
    """
    if torch.compiler.is_compiling():
        return operator(*arguments)
    if forward_ad._current_level >= 0 and any(map(_has_tangent, arguments)):
        raise NotImplementedError(f"{operator} has no forward-mode gradient; use reverse mode, such as torch.autograd.grad")
    if torch.is_grad_enabled():
        return operator(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def _has_tangent(argument: Any) -> bool:
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None


def gradients(
    function: Callable, inputs: list[Any], wanted: list[int], grads: list[Tensor], create_graph: bool = False
) -> list[Tensor]:
    """Gradients of `function(*inputs)` for the inputs at the positions `wanted`; with `create_graph` differentiable again."""
    values = list(inputs)
    # The fused kernels of SDPA have no second-order gradients
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH) if create_graph else nullcontext():
        for i in wanted:  # views, because one tensor may be several inputs
            values[i] = values[i].view_as(values[i]) if create_graph else values[i].detach().requires_grad_()
        outputs = function(*values)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        # An output that was not requested is empty and has no graph
        pairs = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
        used, used_grads = zip(*pairs, strict=True)
        leaves = [values[i] for i in wanted]
        found = torch.autograd.grad(used, leaves, used_grads, allow_unused=True, create_graph=create_graph)
    return [
        torch.zeros_like(x, memory_format=torch.contiguous_format) if grad is None else grad.contiguous()
        for x, grad in zip(leaves, found, strict=True)
    ]


def define_differentiable(
    name: str, arguments: str, returns: str, run: Callable, fake: Callable, reference: Callable, differentiable: list[int]
) -> None:
    """`define` with a backward pass that recomputes the operator with the eager `reference` (same arguments) under autograd.

    `differentiable` are the positions of the arguments that may receive a gradient. The backward pass is an operator of its own,
    so that a compiled graph does not trace into `reference`; with create_graph=True it is `reference` itself, which can be
    differentiated again.
    """
    define(name, arguments, returns, run, fake)

    def run_backward(grads: list[Tensor], needed: list[bool], *inputs: Any) -> list[Tensor]:
        return gradients(reference, list(inputs), [i for i, need in zip(differentiable, needed, strict=True) if need], grads)

    def fake_backward(grads: list[Tensor], needed: list[bool], *inputs: Any) -> list[Tensor]:
        return [inputs[i].new_empty(inputs[i].shape) for i, need in zip(differentiable, needed, strict=True) if need]

    define(f"{name}_backward", f"Tensor[] grads, bool[] needed, {arguments}", "Tensor[]", run_backward, fake_backward)
    backward_op = getattr(getattr(torch.ops, NAMESPACE), f"{name}_backward").default

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        places = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
        ctx.save_for_backward(*(inputs[i] for i in places))
        ctx.places = places
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]

    def backward(ctx: Any, *grads: Tensor) -> tuple:
        inputs = list(ctx.others)
        for place, value in zip(ctx.places, ctx.saved_tensors, strict=True):
            inputs[place] = value
        needed = [ctx.needs_input_grad[i] for i in differentiable]
        wanted = [i for i, need in zip(differentiable, needed, strict=True) if need]
        if torch.is_grad_enabled():  # create_graph=True
            found = gradients(reference, inputs, wanted, list(grads), create_graph=True)
        else:
            found = backward_op(list(grads), needed, *inputs)
        result: list[Tensor | None] = [None] * len(inputs)
        for i, grad in zip(wanted, found, strict=True):
            result[i] = grad
        return tuple(result)

    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=library)
