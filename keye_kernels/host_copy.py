"""Copies from the CPU to a GPU for which the CPU does not wait.

A copy from ordinary (pageable) memory makes the CPU wait for all earlier work of the stream. A copy from pinned memory is queued
like a kernel; torch keeps the pinned memory until the copy has run.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

# Alignment of tensors that share one buffer. Kernels load 16 bytes at a time; a cache line has 128.
ALIGNMENT_BYTES = 128


def copy_to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`tensor.to(device, dtype)`. From the CPU to a GPU, an asynchronous copy of the values that the tensor has now."""
    if tensor.device.type != "cpu" or not _uses_pinned_memory(device):
        return tensor.to(device, dtype)
    pinned = _empty_pinned(tensor.shape, tensor.dtype if dtype is None else dtype)
    return pinned.copy_(tensor).to(device, non_blocking=True)


def copy_all_to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """CPU tensors on `device`. On a GPU they are views of one buffer, which one asynchronous copy fills."""
    if not _uses_pinned_memory(device):
        return [tensor.to(device, non_blocking=True) for tensor in tensors]
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    pinned = _empty_pinned((end,), torch.uint8)
    for start, tensor in zip(starts, tensors, strict=True):
        _view(pinned, start, tensor).copy_(tensor)
    buffer = pinned.to(device, non_blocking=True)
    return [_view(buffer, start, tensor) for start, tensor in zip(starts, tensors, strict=True)]


def _view(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)


def _uses_pinned_memory(device: torch.device) -> bool:
    if device.type != "cuda" or torch.compiler.is_compiling() or not torch.cuda.is_available():
        return False
    # A dispatch mode, for instance that of fake tensors, may have devices that the machine lacks
    return _get_current_dispatch_mode() is None


def _empty_pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)
