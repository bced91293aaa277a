"""`KernelSpec`: what compile, autotune and the counted benchmark need to know about a kernel.

Each kernel has one, in the module KERNEL_spec.py next to it; `registry` finds them. What `verify` needs is in KERNEL_cases.py.
Both import torch, Triton and this folder only: the eager reference is passed in where a method needs it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

from .device import Arch
from .launch_config import Config, ConfigKey

TRITON_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # by Triton's names

Arguments = dict[str, Any]
BuildBatch = Callable[[Tensor], Any]  # grid_thw to the VisionBatch of Keye-VL-8B
# Requests to tune for: {"images": [[count, patches]], "frames": ..., "prompts": [[count, tokens]], "decode": [batch size]}
Workload = dict[str, list[Any]]


@dataclass(frozen=True)
class CompileVariant:
    """One specialization of a kernel in one launch config, as `triton.compile` takes it.

    `signature` maps each parameter of the kernel to an argument type such as "*bf16:16", "i32" or "fp32" (":16" means divisible
    by 16, which the JIT detects by itself), or to the value of a constexpr.
    """

    kernel: Any  # the @triton.jit function
    label: str
    signature: dict[str, Any]
    num_warps: int
    num_stages: int
    uses_tensor_cores: bool
    in_bf16_forward: bool = False  # launched by Preview's forward pass in bf16 with impl="triton"; shown by the counted benchmark
    scores_per_iteration: int = 0  # attention: scores computed by one iteration of the hot loop


@dataclass(frozen=True)
class TuningShape:
    """One launch to tune for: `count` segments of `size` rows each. `part`: "vision", "text", or the name of a linear layer."""

    kernel: str
    part: str
    count: int
    size: int

    @property
    def total(self) -> int:
        return self.count * self.size

    def __str__(self) -> str:
        return f"{self.kernel}, {self.part}, {self.count} x {self.size}"


@dataclass
class TuningProblem:
    """The launch and the expected result of one shape; both use the same inputs."""

    launch: Callable[[Config], tuple[Tensor, ...]]
    expect: Callable[[torch.dtype], tuple[Tensor, ...]]  # the reference in a dtype, for the output rows `rows` only
    rows: Tensor


@dataclass(frozen=True)
class CountedCase:
    """One call of a public operator whose memory traffic and FLOPs are counted in Triton's interpreter.

    `inputs` are the tensors that have to be read once, `written` those that are modified in place. `needed_flops` counts matmuls
    without padding, 0 where there are none. `intermediate_bytes` are written and read once. `limits` are the budgets that the
    count must keep.
    """

    name: str
    label: str
    operator: str
    arguments: Arguments
    inputs: Sequence[Tensor]
    limits: dict[str, float]
    needed_flops: int = 0
    intermediate_bytes: int = 0
    config: Config | None = None  # replaces the heuristic's launch config
    written: Sequence[Tensor] = ()


class KernelSpec(ABC):
    """One kernel: its name (in tables, command lines and reports), workloads, launch configs, inputs and compiled variants."""

    name: str
    # Config fields that must agree in all buckets of a key, so that results do not depend on what else is in a batch
    fields_shared_by_buckets: tuple[str, ...] = ()

    @abstractmethod
    def shapes(self, workload: Workload) -> list[TuningShape]:
        """The launches that a workload makes."""

    @abstractmethod
    def config_key(self, shape: TuningShape, dtype: str) -> ConfigKey:
        """The key under which the launcher looks up its config."""

    @abstractmethod
    def part_of(self, key: ConfigKey) -> str:
        """The `part` of the shapes that have this key."""

    @abstractmethod
    def heuristic(self, shape: TuningShape, dtype: str, arch: Arch) -> Config:
        """The launch config where no table has an entry."""

    @abstractmethod
    def candidates(self, shape: TuningShape, arch: Arch, heuristic: Config) -> list[Config]:
        """The configs that autotune tries first, as changes to the heuristic's."""

    def refinements(self, config: Config) -> list[Config]:
        """Further configs to try around one of the fastest, as changes to it."""
        return []

    def shared_bytes(self, shape: TuningShape, config: Config, arch: Arch) -> int:
        """A lower bound of the shared memory that the software pipeline needs; 0 where unknown."""
        return 0

    @abstractmethod
    def tuning_problem(self, shape: TuningShape, dtype: str, device: torch.device, reference: ModuleType) -> TuningProblem:
        """Inputs of a shape. `reference` is the module with the eager functions."""

    @abstractmethod
    def variants(self, part: str, dtype: str, arch: Arch, config: Config) -> list[CompileVariant]:
        """The specializations that launches with this config use, the most common first; empty if a library runs instead."""

    @abstractmethod
    def shipped_variants(self, arch: Arch) -> list[CompileVariant]:
        """The specializations that the models need on an architecture without a table."""

    def counted_cases(self, vision_batch: BuildBatch) -> list[CountedCase]:
        """What the counted benchmark runs. Empty if another kernel's cases cover this one."""
        return []


def first_and_last(total: int, device: torch.device, count: int = 2048) -> Tensor:
    """Indices of the first and last `count` of `total` rows: those that autotune compares with the reference."""
    head = torch.arange(min(total, count), device=device)
    return torch.cat((head, torch.arange(max(len(head), total - count), total, device=device)))


def random_inputs(dtype: str, device: torch.device) -> Callable[..., Tensor]:
    """A function of sizes (and `scale`) that draws normal tensors, the same in every run."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=TORCH_DTYPES[dtype]) * scale

    return normal
