"""Counts the work of one case in Triton's interpreter: of this package's kernels, or of a peer's on the same inputs.

Bytes are those of float16; bfloat16 has the same.
"""

from contextlib import nullcontext
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from keye_kernels import ops
from keye_kernels.geometry import VisionBatch
from keye_kernels.triton import launch_config
from keye_kernels.triton.registry import kernel_specs
from keye_kernels.triton.spec import CountedCase

from .peers import PEERS
from .traffic import count_traffic, tensor_bytes

OURS = "keye_kernels"
MAX_PEER_ERROR = 2e-2  # of the largest value


@cache
def counted_cases() -> dict[str, CountedCase]:
    """The cases of all kernels by name, in the order of the registry. Inputs are the same in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {case.name: case for spec in kernel_specs() for case in spec.counted_cases(_vision_batch)}


def _vision_batch(grid_thw: Tensor) -> VisionBatch:
    return VisionBatch.build(grid_thw, int(grid_thw.prod(1).sum()), table_side=27)


def count_case(name: str, by: str = OURS) -> dict[str, Any]:
    """Counts one case, in a process whose Triton interprets. Raises ValueError where a peer computes something else."""
    case = counted_cases()[name]
    call = partial(_run_ours, case) if by == OURS else next(peer for peer in PEERS if peer.name == by).make_call(case)
    # A peer that selects the tensor's GPU for its launch finds none here
    with patch.object(torch.cuda, "device", lambda _: nullcontext()), count_traffic() as traffic:
        outputs = _as_tuple(call())
    if by != OURS:
        _check_peer(by, case, outputs)
    floor = tensor_bytes(*case.inputs, *case.written, *outputs) + case.intermediate_bytes
    row = {
        "operator": case.label, "by": by, "launches": len(traffic.launches), "eager_operators": len(traffic.eager_operators),
        "floor_bytes": floor, "requested": traffic.requested / floor, "unique": traffic.unique / floor,
        "multiplies": traffic.dot_flops / case.needed_flops if case.needed_flops else None,
        "idle": traffic.idle_programs, "limits": case.limits if by == OURS else {},
    }  # fmt: skip
    return {**row, "above": [key for key, limit in row["limits"].items() if row[key] > limit]}


def _run_ours(case: CountedCase) -> Tensor | tuple[Tensor, ...]:
    launch_config.clear_cache()
    try:
        with patch.object(launch_config, "_look_up", lambda *_: case.config) if case.config else nullcontext():
            return getattr(ops, case.operator)(**case.arguments, impl="triton")
    finally:
        launch_config.clear_cache()


def _check_peer(by: str, case: CountedCase, outputs: tuple[Tensor, ...]) -> None:
    expected = _as_tuple(getattr(ops, case.operator)(**case.arguments, impl="reference"))
    for output, exact in zip(outputs, expected, strict=True):
        if (output.float() - exact.float()).abs().max() > MAX_PEER_ERROR * exact.float().abs().max():
            raise ValueError(f"{by} does not compute {case.label}")


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
