"""Argument checks. They read metadata only, never the values of a tensor."""

from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int32, torch.int64)
MAX_INT32 = 2**31 - 1
MAX_FLOAT32 = torch.finfo(torch.float32).max  # kernels take numbers as float32, in which larger ones are infinite


def check_tensor(name: str, x: Tensor, shape: tuple[int | str, ...], dtypes: tuple[torch.dtype, ...], like: Tensor) -> None:
    """TypeError or ValueError unless `x` has one of `dtypes`, this shape (a string is any size) and the device of `like`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {_show(shape)}, got {type(x).__name__}")
    sizes = zip(shape, x.shape, strict=False)
    if x.ndim != len(shape) or any(not isinstance(wanted, str) and wanted != found for wanted, found in sizes):
        raise ValueError(f"{name} must have shape {_show(shape)}, got {list(x.shape)}")
    if x.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the other tensors, got {x.device}")


def check_heads(name: str, x: Tensor, like: Tensor | None = None) -> None:
    """`check_tensor` for packed heads [T, H, D] with a contiguous last axis, T and D as in `like`."""
    shape = ("T", "H", "D") if like is None else (like.shape[0], "H", like.shape[2])
    check_tensor(name, x, shape, FLOATS, x if like is None else like)
    check_last_axis(name, x)


def check_number(name: str, value: Any, wanted: str = "a finite number", minimum: float = -MAX_FLOAT32) -> None:
    """TypeError or ValueError unless `value` is a finite number of at least `minimum`; `wanted` says this in the message."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be {wanted}, got {value!r}")
    if not minimum <= value <= MAX_FLOAT32:  # false for NaN; torch.compile cannot trace math.isfinite
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def check_eps(eps: Any) -> None:
    check_number("eps", eps, "a finite number of at least 0", minimum=0)


def check_int32_offsets(name: str, x: Tensor) -> None:
    """ValueError where the kernels' 32-bit offsets into `x` would overflow."""
    if x.numel() > MAX_INT32:
        raise ValueError(f"{name} must have fewer than 2**31 elements, got shape {list(x.shape)}")


def check_indices(name: str, indices: Tensor, size: int) -> None:
    """ValueError where indices on the CPU are not below `size`: a kernel would read other memory. A GPU would have to wait."""
    if indices.device.type == "cpu" and indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < size:
        raise ValueError(f"{name} must be from 0 to {size - 1}, got {int(indices.min())} to {int(indices.max())}")


def check_last_axis(name: str, x: Tensor) -> None:
    """ValueError unless the last axis of `x` is contiguous."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"{name} must be contiguous along its last axis, got strides {list(x.stride())}")


def _show(shape: tuple[int | str, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
