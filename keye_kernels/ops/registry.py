"""Registers operators with torch.library: schema, CPU and CUDA/ROCm implementation, fake, autograd."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "keye_kernels"
DEVICE_KEYS = ("CPU", "CUDA")  # ROCm builds of torch answer to CUDA

library = torch.library.Library(NAMESPACE, "DEF")


def define(name: str, arguments: str, returns: str, run: Callable, fake: Callable) -> None:
    """Registers `name(arguments) -> returns`. `run` computes it and `fake` its output shapes, with the schema's arguments."""
    library.define(f"{name}({arguments}) -> {returns}")
    for key in DEVICE_KEYS:
        library.impl(name, run, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)


def call(operator: Callable, *arguments: Any) -> Any:
    """`operator(*arguments)`. Without gradients it bypasses the autograd key, whose Python fallback costs as much as a launch."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return operator(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def define_differentiable(
    name: str, arguments: str, returns: str, run: Callable, fake: Callable, reference: Callable, differentiable: list[int]
) -> None:
    """`define` with a backward pass that recomputes the operator with the eager `reference` (same arguments) under autograd.

    `differentiable` are the positions of the arguments that may receive a gradient. The backward pass is an operator of its own,
    so that a compiled graph does not trace into `reference`.
    """
    define(name, arguments, returns, run, fake)

    def run_backward(grads: list[Tensor], needed: list[bool], *inputs: Any) -> list[Tensor]:
        values = list(inputs)
        wanted = [i for i, need in zip(differentiable, needed, strict=True) if need]
        with torch.enable_grad():
            for i in wanted:
                values[i] = values[i].detach().requires_grad_()
            outputs = reference(*values)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            # An output that was not requested is empty and has no graph
            pairs = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
            used, used_grads = zip(*pairs, strict=True)
            found = torch.autograd.grad(used, [values[i] for i in wanted], used_grads, allow_unused=True)
        return [
            torch.zeros_like(values[i], memory_format=torch.contiguous_format) if grad is None else grad.contiguous()
            for i, grad in zip(wanted, found, strict=True)
        ]

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
        found = iter(backward_op(list(grads), needed, *inputs))
        result: list[Tensor | None] = [None] * len(inputs)
        for i, need in zip(differentiable, needed, strict=True):
            if need:
                result[i] = next(found)
        return tuple(result)

    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=library)
