"""Memory traffic and FLOPs of Triton kernels, counted in Triton's interpreter; needs no GPU.

    with count_traffic() as traffic:  # in a process with TRITON_INTERPRET=1
        kk.ops.rope_2d(q, k, position_ids, inv_freq, impl="triton")
    traffic.requested, traffic.unique, len(traffic.launches)

Not counted: repeated loads of the same bytes by threads of one program, shared memory, spills.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MERGE_EVERY = 1 << 20  # intervals held before they are merged
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
NAMESPACE = "keye_kernels"  # of our operators: their launches are counted, the operators themselves are not


class ByteSet:
    """A set of byte addresses, stored as intervals."""

    def __init__(self) -> None:
        self.starts: list[np.ndarray] = []
        self.ends: list[np.ndarray] = []
        self.held = 0

    def add(self, addresses: np.ndarray, size: int) -> None:
        """Adds elements of `size` bytes at these addresses, in any order and with repetitions; at least one."""
        addresses = addresses.astype(np.int64)
        if (addresses[1:] < addresses[:-1]).any():
            addresses.sort()
        gaps = np.flatnonzero(addresses[1:] - addresses[:-1] > size)
        self.starts.append(addresses[np.concatenate(([0], gaps + 1))])
        self.ends.append(addresses[np.concatenate((gaps, [-1]))] + size)
        self.held += len(gaps) + 1
        if self.held > MERGE_EVERY:
            self._merge()

    def _merge(self) -> None:
        if not self.starts:
            return
        starts, ends = np.concatenate(self.starts), np.concatenate(self.ends)
        order = np.argsort(starts, kind="stable")
        starts, reached = starts[order], np.maximum.accumulate(ends[order])
        gaps = np.flatnonzero(starts[1:] > reached[:-1])
        self.starts = [starts[np.concatenate(([0], gaps + 1))]]
        self.ends = [reached[np.concatenate((gaps, [-1]))]]
        self.held = 0  # counts new intervals only, so that many scattered bytes do not cause a merge at each step

    def __len__(self) -> int:
        self._merge()
        return int((self.ends[0] - self.starts[0]).sum()) if self.starts else 0


@dataclass
class Launch:
    """One launch of one kernel.

    loaded, stored: bytes of all unmasked lanes, as if no cache helped (an atomic operation counts in both).
    loaded_once, stored_once: distinct bytes among them, as if a perfect cache started empty.
    dot_flops: 2·M·N·K of every `tl.dot`, padding included. idle_programs: programs that stored nothing.
    """

    kernel: str
    programs: int = 0
    idle_programs: int = 0
    loaded: int = 0
    stored: int = 0
    loaded_once: int = 0
    stored_once: int = 0
    dot_flops: int = 0


@dataclass
class Traffic:
    """All launches of a block, and the eager operators next to them (each reads its inputs and writes its outputs once)."""

    launches: list[Launch] = field(default_factory=list)
    eager_operators: list[str] = field(default_factory=list)
    eager_bytes: int = 0

    @property
    def requested(self) -> int:
        return self.eager_bytes + sum(launch.loaded + launch.stored for launch in self.launches)

    @property
    def unique(self) -> int:
        return self.eager_bytes + sum(launch.loaded_once + launch.stored_once for launch in self.launches)

    @property
    def dot_flops(self) -> int:
        return sum(launch.dot_flops for launch in self.launches)

    @property
    def idle_programs(self) -> int:
        return sum(launch.idle_programs for launch in self.launches)


def tensor_bytes(*tensors: Tensor) -> int:
    """Stored bytes; an expanded dimension counts once."""
    return sum(
        t.element_size() * math.prod(size for size, stride in zip(t.shape, t.stride(), strict=True) if stride)
        for t in tensors
        if t.numel()
    )


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Counts the launches and the eager operators of a block. Raises RuntimeError where Triton does not interpret."""
    import triton
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    if not triton.knobs.runtime.interpret:
        raise RuntimeError("traffic is counted in Triton's interpreter: set TRITON_INTERPRET=1 before Python starts")
    hooks = _Hooks()
    places = [
        (GridExecutor, "__call__", hooks.launch),
        (InterpreterBuilder, "set_grid_idx", hooks.program),
        # Plain and descriptor accesses go through these two as well
        (InterpreterBuilder, "create_masked_load", hooks.load),
        (InterpreterBuilder, "create_masked_store", hooks.store),
        (InterpreterBuilder, "create_atomic_rmw", hooks.atomic),
        (InterpreterBuilder, "create_dot", hooks.dot),
    ]
    with ExitStack() as stack:
        for owner, name, hook in places:
            stack.enter_context(patch.object(owner, name, _before(hook, getattr(owner, name))))
        stack.enter_context(_EagerOperators(hooks))
        yield hooks.traffic


def _before(hook: Callable, original: Callable) -> Callable:
    def run(owner: Any, *arguments: Any, **keywords: Any) -> Any:
        return hook(original, owner, *arguments, **keywords)

    return run


class _Hooks:
    """Replace methods of the interpreter: count, then call the original."""

    def __init__(self) -> None:
        self.traffic = Traffic()
        self.now: Launch | None = None

    def launch(self, original: Callable, executor: Any, *arguments: Any, **keywords: Any) -> None:
        self.now = Launch(executor.fn.__name__)
        self.loads, self.stores = ByteSet(), ByteSet()
        self.has_stored = True
        try:
            original(executor, *arguments, **keywords)
        finally:
            launch, self.now = self.now, None
        launch.idle_programs += not self.has_stored
        launch.loaded_once, launch.stored_once = len(self.loads), len(self.stores)
        self.traffic.launches.append(launch)

    def program(self, original: Callable, builder: Any, *index: int) -> None:
        self.now.idle_programs += not self.has_stored  # the program before this one
        self.now.programs += 1
        self.has_stored = False
        original(builder, *index)

    def load(self, original: Callable, builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        self.now.loaded += _touch(self.loads, pointers, mask)
        return original(builder, pointers, mask, *rest)

    def store(self, original: Callable, builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        stored = _touch(self.stores, pointers, mask)
        self.now.stored += stored
        self.has_stored |= stored > 0
        return original(builder, pointers, value, mask, *rest)

    def atomic(self, original: Callable, builder: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        self.now.loaded += _touch(self.loads, pointers, mask)
        stored = _touch(self.stores, pointers, mask)
        self.now.stored += stored
        self.has_stored |= stored > 0
        return original(builder, op, pointers, value, mask, *rest)

    def dot(self, original: Callable, builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        self.now.dot_flops += 2 * a.data.size * b.data.shape[-1]
        return original(builder, a, b, *rest)


def _touch(seen: ByteSet, pointers: Any, mask: Any) -> int:
    """Bytes of the unmasked lanes, noted in `seen`."""
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
    if addresses.size:
        seen.add(addresses, size)
    return addresses.size * size


class _EagerOperators(TorchDispatchMode):
    def __init__(self, hooks: _Hooks) -> None:
        super().__init__()
        self.hooks = hooks

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        ours = func.namespace == NAMESPACE
        if self.hooks.now is None and not ours and not func.is_view and name not in ALLOCATIONS:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.hooks.traffic.eager_operators.append(name)
            self.hooks.traffic.eager_bytes += tensor_bytes(*tensors)
        return result
