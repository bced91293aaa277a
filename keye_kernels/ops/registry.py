"""One way to register an operator with torch.library: schema, CPU and CUDA/ROCm kernels, fake, autograd."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "keye_kernels"
DEVICE_KEYS = ("CPU", "CUDA")  # ROCm builds of torch answer to CUDA

library = torch.library.Library(NAMESPACE, "DEF")


def define(name: str, arguments: str, returns: str, run: Callable, fake: Callable) -> None:
    """Registers `name(arguments) -> returns`, computed by `run`, its shapes by `fake`, both with the schema's arguments."""
    library.define(f"{name}({arguments}) -> {returns}")
    for key in DEVICE_KEYS:
        library.impl(name, run, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)


def call(operator: Callable, *arguments: Any) -> Any:
    """`operator(*arguments)`; where no gradient is wanted, past autograd, whose way round is Python and costs a launch again."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return operator(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def define_differentiable(
    name: str,
    arguments: str,
    returns: str,
    run: Callable,
    fake: Callable,
    reference: Callable,
    differentiable: list[int],
) -> None:
    """`define`, with gradients by recomputation: the backward pass runs `reference` again, under autograd.

    `reference` takes the schema's arguments as well; `differentiable` are the places of those that may receive a gradient.
    The backward pass is an operator of its own, so that what `reference` does is hidden from a compiled graph.
    """
    define(name, arguments, returns, run, fake)

    def run_backward(grads: list[Tensor], needed: list[bool], *inputs: Any) -> list[Tensor]:
        inputs = list(inputs)
        wanted = [i for i, need in zip(differentiable, needed, strict=True) if need]
        with torch.enable_grad():
            for i in wanted:
                inputs[i] = inputs[i].detach().requires_grad_()
            outputs = reference(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            # An output that was not asked for is empty and hangs on nothing
            pairs = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
            outputs, grads = zip(*pairs, strict=True)
            found = torch.autograd.grad(outputs, [inputs[i] for i in wanted], grads, allow_unused=True)
        return [
            torch.zeros_like(inputs[i], memory_format=torch.contiguous_format) if grad is None else grad.contiguous()
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
