"""Kernels of installed peers on the inputs of our counted cases: Liger-Kernel's rope and norm, flash-attn's rotary."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from keye_kernels.triton.spec import CountedCase

HALF = torch.float16


@dataclass(frozen=True)
class Peer:
    """Another library that computes the same as one of our counted cases."""

    name: str
    package: str  # import name
    case: str  # name of our case
    make_call: Callable[[CountedCase], Callable[[], tuple[Tensor, ...]]]


class _Float(float):
    """A number with the method `to`: Triton's interpreter passes Python floats to a kernel, the compiler does not."""

    def to(self, _: Any) -> "_Float":
        return self


def _liger(case: CountedCase) -> Callable[[], tuple[Tensor, ...]]:
    import triton

    mrope, rms_norm = (import_module(f"liger_kernel.ops.{name}") for name in ("qwen2vl_mrope", "rms_norm"))
    given = case.arguments
    q, k = given["q"].contiguous(), given["k"].contiguous()  # outputs of separate projections
    angles = (given["position_ids"][..., None] * given["inv_freq"]).repeat(1, 1, 2)[:, None]  # [3, 1, T, D]
    cos, sin = angles.cos().to(HALF), angles.sin().to(HALF)

    def run() -> tuple[Tensor, ...]:
        # No offset of the weight; "llama" multiplies by it in the input's dtype; row blocks where there are many rows
        options = _Float(1e-6), _Float(0.0), "llama", None
        # libdevice's rsqrt does not run in the interpreter, Triton's own does
        with patch.object(rms_norm, "rsqrt", lambda x: triton.language.rsqrt(x)):
            normed = [rms_norm.rms_norm_forward(x, given[f"{name}_norm_weight"], *options)[0] for name, x in (("q", q), ("k", k))]
        heads_first = (x.transpose(0, 1)[None] for x in normed)
        rotated = mrope.qwen2vl_mrope_forward(*heads_first, cos, sin, given["mrope_section"])[:2]
        return tuple(x[0].transpose(0, 1) for x in rotated)

    return run


def _flash_attn(case: CountedCase) -> Callable[[], tuple[Tensor, ...]]:
    given = case.arguments
    angles = (given["position_ids"].T[..., None] * given["inv_freq"]).flatten(1)  # [T, D/2], rows then columns
    cos, sin = angles.cos(), angles.sin()
    rotary = _flash_attn_rotary()

    def run() -> tuple[Tensor, ...]:
        # In float32, as the official code calls it
        return tuple(rotary.apply_rotary(given[name].float()[None], cos, sin)[0].to(HALF) for name in "qk")

    return run


def _flash_attn_rotary() -> ModuleType:
    """One file of the package: the package itself cannot be imported without a GPU."""
    (folder,) = importlib.util.find_spec("flash_attn").submodule_search_locations
    spec = importlib.util.spec_from_file_location("flash_attn_rotary", f"{folder}/ops/triton/rotary.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PEERS = (Peer("Liger-Kernel", "liger_kernel", "rope_3d", _liger), Peer("flash-attn", "flash_attn", "rope_2d", _flash_attn))
