"""Counts the kernels that a forward on a GPU would launch, on a machine without one.

`as_if_on_gpu` gives a model tensors that say they are on a GPU and compute on the CPU, so that code takes the branches of a GPU
and reads real values. `count_launches` counts every operator that computes or copies something as one launch; views, metadata
and allocations are none. `LAUNCHES` lists the operators with another number of launches.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from keye_kernels import ops, plain
from keye_kernels.model import fused

GPU = torch.device("cuda", 0)
# Neither views nor launches: allocations, and reads of a value by the CPU
FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "detach",
    "lift_fresh",
    "alias",
    "_unsafe_view",
    "_local_scalar_dense",
}
# Norm and merge, matmul, GELU, matmul
LAUNCHES = {"keye_kernels::patch_merge_projection": 4}
WAITS = "waits of the CPU for the GPU"
counts: Counter[str] = Counter()


class GpuTensor(Tensor):
    """A tensor that says it is on a GPU, with its values in a CPU tensor of the same layout."""

    @staticmethod
    def __new__(cls, values: Tensor) -> "GpuTensor":
        return Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(),
            dtype=values.dtype, device=GPU, requires_grad=False,
        )  # fmt: skip

    def __init__(self, values: Tensor):
        self.values = values

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            counts["scaled_dot_product_attention"] += 1
            with torch._C.DisableTorchFunctionSubclass():
                return GpuTensor(function(*cpu(args), **cpu(kwargs or {})))
        if function is Tensor.__getitem__:  # needs a device guard, which a build without CUDA lacks
            x, index = args
            counts["index"] += any(isinstance(value, Tensor) for value in tree_leaves(index))
            return GpuTensor(cpu(x)[cpu(index)])
        if function in (Tensor.tolist, Tensor.item):
            counts[WAITS] += 1
            return function(args[0].values)
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return CountLaunches().__torch_dispatch__(function, types, args, kwargs)


class CountLaunches(TorchDispatchMode):
    """Runs operators of GPU tensors on the CPU, and counts their launches."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = kwargs.get("device")
        is_input = any(isinstance(value, GpuTensor) for value in tree_leaves((args, kwargs)))
        is_output = is_input if target is None else torch.device(target).type == "cuda"
        if not (is_input or is_output):
            return function(*args, **kwargs)
        name = function._schema.name
        if not function.is_view and name.removeprefix("aten::") not in FREE:
            counts[name] += LAUNCHES.get(name, 1)
        counts[WAITS] += name == "aten::_local_scalar_dense"
        if name == "keye_kernels::varlen_attention" and not args[-1]:
            counts["zero fill of the output"] += 1
        if name.startswith("keye_kernels::"):
            args = tuple("reference" if value == "triton" else value for value in args)
        with ops.use_impl("reference"):
            out = function(*cpu(args), **cpu(kwargs))
        if function._schema.is_mutable:
            return args[0]
        return tree_map_only(Tensor, GpuTensor, out) if is_output else out


def cpu(tree: Any) -> Any:
    def convert(value: Any) -> Any:
        if isinstance(value, GpuTensor):
            return value.values
        return torch.device("cpu") if isinstance(value, torch.device) else value

    return tree_map(convert, tree)


def as_if_on_gpu(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(GpuTensor(weight.detach()), requires_grad=False)
        for name, values in module._buffers.items():
            if values is not None:
                module._buffers[name] = GpuTensor(values)
    return model


@contextmanager
def count_launches() -> Iterator[Counter]:
    """Counts the launches in the block: name of an operator to its number, and waits of the CPU for the GPU."""
    counts.clear()
    plain_tensors = (*plain.PLAIN_TENSORS, GpuTensor)
    with (
        CountLaunches(),
        torch.no_grad(),
        patch.object(torch.cuda, "_lazy_init", lambda: None),
        patch.object(plain, "PLAIN_TENSORS", plain_tensors),
        patch.object(fused, "PLAIN_TENSORS", plain_tensors),
        patch.object(fused, "_epilogue_is_tanh", lambda device: True),  # as cuBLASLt's
    ):
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes a CPU tensor first, then copies it
        try:
            yield counts
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
