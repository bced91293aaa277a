"""Copies between the CPU and a GPU for which the CPU does not wait.

A copy from ordinary (pageable) memory makes the CPU wait for all earlier work of the stream. A copy from pinned memory is queued
like a kernel; torch keeps the pinned memory until the copy has run.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

# Alignment of tensors that share one buffer. Kernels load 16 bytes at a time; a cache line has 128.
ALIGNMENT_BYTES = 128


def copy_to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None, non_blocking: bool = False) -> Tensor:
    """`tensor.to(device, dtype)`. From the CPU to a GPU, an asynchronous copy of the values that the tensor has now."""
    if tensor.device.type != "cpu" or not _uses_pinned_memory(device):
        return tensor.to(device, dtype, non_blocking=non_blocking)
    pinned = _empty_pinned(tensor.shape, tensor.dtype if dtype is None else dtype)
    return pinned.copy_(tensor).to(device, non_blocking=True)


def overwrite(target: Tensor, tensor: Tensor) -> None:
    """`target.copy_(tensor)` for a tensor on the CPU. To a GPU, an asynchronous copy of the values that the tensor has now."""
    if _uses_pinned_memory(target.device):
        target.copy_(_empty_pinned(tensor.shape, tensor.dtype).copy_(tensor), non_blocking=True)
    else:
        target.copy_(tensor)


def copy_all_to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """CPU tensors on `device`. On a GPU they are views of one buffer, which one asynchronous copy fills."""
    if not _uses_pinned_memory(device):
        return [tensor.to(device, non_blocking=True) for tensor in tensors]
    layout = Layout([(tuple(tensor.shape), tensor.dtype) for tensor in tensors])
    pinned = _empty_pinned((layout.nbytes,), torch.uint8)
    for place, tensor in zip(layout.views(pinned), tensors, strict=True):
        place.copy_(tensor)
    return layout.views(pinned.to(device, non_blocking=True))


class Layout:
    """Where tensors of the given shapes and dtypes are in one buffer."""

    def __init__(self, tensors: Sequence[tuple[tuple[int, ...], torch.dtype]]):
        self.tensors, self.ranges, self.nbytes = tensors, [], 0
        for shape, dtype in tensors:
            end = self.nbytes + math.prod(shape) * dtype.itemsize
            self.ranges.append((self.nbytes, end))
            self.nbytes = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The tensors in a buffer, uint8 [nbytes]."""
        return [
            buffer[start:end].view(dtype).view(shape)
            for (start, end), (shape, dtype) in zip(self.ranges, self.tensors, strict=True)
        ]


class StaticTensors:
    """Tensors on a device that stay where they are while their values change, as the inputs of a CUDA graph do."""

    def __init__(self, tensors: Sequence[tuple[tuple[int, ...], torch.dtype]], device: torch.device):
        self.layout = Layout(tensors)
        self.buffer = torch.zeros(self.layout.nbytes, dtype=torch.uint8, device=device)
        self.views = self.layout.views(self.buffer)

    def overwrite(self, tensors: Sequence[Tensor]) -> None:
        """Copies CPU tensors into the first elements of every axis, and zeros behind them. One copy, asynchronous on a GPU."""
        staged = torch.zeros(self.layout.nbytes, dtype=torch.uint8, device="cpu")
        for place, tensor in zip(self.layout.views(staged), tensors, strict=True):
            place[tuple(slice(size) for size in tensor.shape)] = tensor
        overwrite(self.buffer, staged)


class HostCopies:
    """Copies of small tensors to the CPU, for which the CPU waits only when it needs the values.

    Attributes:
        delay: how many copies may be under way when a new one starts. 0 on a CPU.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.delay = 1 if _uses_pinned_memory(device) else 0

    def start(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Queues a copy of the values that the tensor has after the work queued so far. The function returned waits for it."""
        if not self.delay:
            copy = tensor.clone()
            return lambda: copy
        pinned, event = _empty_pinned(tensor.shape, tensor.dtype), torch.cuda.Event()
        pinned.copy_(tensor, non_blocking=True)
        event.record(torch.cuda.current_stream(self.device))

        def finish() -> Tensor:
            event.synchronize()
            return pinned.clone()

        return finish


def _uses_pinned_memory(device: torch.device) -> bool:
    if device.type != "cuda" or torch.compiler.is_compiling() or not torch.cuda.is_available():
        return False
    # A dispatch mode, for instance that of fake tensors, may have devices that the machine lacks
    return _get_current_dispatch_mode() is None


def _empty_pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)
