"""Tensor descriptors: blocks fetched by the copy engine (TMA) of Hopper and later instead of one address per load.

A launch config's `use_tma` selects them. Building descriptors costs CPU time, so only timed tables set it.
"""

from typing import Any

from torch import Tensor

from .launch_config import Config

ALIGNMENT_BYTES = 16  # of the base address and of every stride but the last

BlockShape = list[int] | None


def make_descriptors(config: Config, *blocks: tuple[Tensor, BlockShape]) -> list[Any]:
    """One descriptor per (tensor, block shape) for a launch; loads past a tensor's edges return zeros.

    None for a block shape of None. All are None where `use_tma` is off or a tensor is not aligned: the kernel then uses pointers.
    """
    if not config["use_tma"] or not all(_is_aligned(x) for x, _ in blocks):
        return [None] * len(blocks)
    from triton.tools.tensor_descriptor import TensorDescriptor

    return [block and TensorDescriptor.from_tensor(x, block) for x, block in blocks]


def descriptor_types(config: Config, dtype: str, *blocks: BlockShape) -> list[str | None]:
    """The signature strings of the same descriptors for a `CompileVariant`; `dtype` is Triton's name."""
    if not config["use_tma"]:
        return [None] * len(blocks)
    return [block and f"tensordesc<{dtype}[{','.join(map(str, block))}]>" for block in blocks]


def _is_aligned(x: Tensor) -> bool:
    strides = [stride * x.element_size() for stride in x.stride()[:-1]]
    return x.stride(-1) == 1 and not any(number % ALIGNMENT_BYTES for number in (x.data_ptr(), *strides))
