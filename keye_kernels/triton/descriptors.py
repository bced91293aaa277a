"""Tensor descriptors: whole blocks fetched by the chip's copy engine (TMA), where pointers cost an address for every access.

A tile's "loads" says which: "pointers" everywhere, "descriptors" on Hopper and later where a timed table says so.
"""

from typing import Any

from torch import Tensor

from .tiles import Config

ALIGNMENT = 16  # bytes, of the first element and of every stride but the last

Block = list[int] | None


def loads_of(arch: int | str) -> tuple[str, ...]:
    """What a target can do; `arch` is 90 for sm_90, "gfx942" for AMD's."""
    return ("pointers", "descriptors") if isinstance(arch, int) and arch >= 90 else ("pointers",)


def describe(config: Config, *blocks: tuple[Tensor, Block]) -> list[Any]:
    """Descriptors that fetch a tensor block by block (zeros past its edges), for a launch.

    None for a block of None; None for all of them where the tile loads by pointers, or a tensor is not aligned for the engine.
    """
    if config["loads"] != "descriptors" or not all(_is_aligned(x) for x, _ in blocks):
        return [None] * len(blocks)
    from triton.tools.tensor_descriptor import TensorDescriptor

    return [block and TensorDescriptor.from_tensor(x, block) for x, block in blocks]


def describe_types(config: Config, dtype: str, *blocks: Block) -> list[str | None]:
    """The same for a `CompileSpec`; `dtype` is Triton's name."""
    if config["loads"] != "descriptors":
        return [None] * len(blocks)
    return [block and f"tensordesc<{dtype}[{','.join(map(str, block))}]>" for block in blocks]


def _is_aligned(x: Tensor) -> bool:
    strides = [stride * x.element_size() for stride in x.stride()[:-1]]
    return x.stride(-1) == 1 and not any(number % ALIGNMENT for number in (x.data_ptr(), *strides))
