"""Repeats a call of an operator without its checks, the dispatcher and the choice of a launch config.

All of these depend on the metadata of the arguments only: shape, strides, dtype and device. The layers of a model call an
operator with the same metadata again and again, and for a short prompt the GPU would wait for the CPU to repeat them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from keye_kernels.triton.launch_config import version

from .implementation import default_impl

MAX_PREPARED_CALLS = 4096
PLAIN_TYPES = (Tensor, Parameter)  # subclasses, such as DTensor, need the dispatcher
DEVICE_TYPES = ("cuda",)

PreparedCalls = dict[tuple, Callable]

PREPARED: PreparedCalls = {}


def call_key(operator: str, impl: str, options: tuple, *tensors: Tensor | None) -> tuple | None:
    """The key of a prepared call: everything that it may depend on. None if the call needs autograd or the dispatcher."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return None
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    has_gradients = torch.is_grad_enabled()
    key: list[Any] = [operator, default_impl() if impl == "auto" else impl, version(), options]
    for x in tensors:
        if x is None:
            key.append(None)
            continue
        if type(x) not in PLAIN_TYPES or (has_gradients and x.requires_grad) or x.device.type not in DEVICE_TYPES:
            return None
        key.append((x.shape, x.stride(), x.dtype, x.device))
    return tuple(key)


def find(key: tuple | None, calls: PreparedCalls = PREPARED) -> Callable | None:
    """The function that `remember` stored for this key. It takes the tensors of the call."""
    if key is None:
        return None
    try:
        return calls.get(key)
    except TypeError:  # an option of a wrong type cannot be hashed
        return None


def remember(key: tuple, run: Callable, calls: PreparedCalls = PREPARED) -> Callable:
    if len(calls) >= MAX_PREPARED_CALLS:
        calls.clear()
    calls[key] = run
    return run
