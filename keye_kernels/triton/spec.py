"""How a kernel tells the ahead-of-time checker which variants of it ship."""

from dataclasses import dataclass
from typing import Any

import triton

TRITON_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])


@dataclass(frozen=True)
class CompileSpec:
    """One kernel in one tile configuration, as `triton.compile` takes it.

    `signature` gives each of the kernel's parameters: a string such as "*bf16:16", "i32" or "fp32" is an argument's type
    (":16" = divisible by 16, what the JIT finds out for itself), any other value is a constexpr.
    """

    kernel: Any  # the @triton.jit function
    label: str
    signature: dict[str, Any]
    num_warps: int
    num_stages: int
    uses_tensor_cores: bool
