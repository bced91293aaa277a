"""Whether a tile computes what the reference does."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from keye_kernels.triton.tiles import Config

from .problems import Problem


class Checker:
    """Compares launches of one problem with the reference in float32.

    A tile may err by twice what the reference errs in the dtype itself, plus twice one eps of the largest value: the rule of
    the kernels' own tests.
    """

    def __init__(self, problem: Problem, dtype: torch.dtype):
        self.problem, self.exact = problem, problem.expect(torch.float32)
        eps = torch.finfo(dtype).eps
        self.allowed = [
            2 * ((eager.float() - exact).abs().max() + eps * exact.abs().max()).item()
            for eager, exact in zip(problem.expect(dtype), self.exact, strict=True)
        ]

    def error(self, config: Config) -> str | None:
        """What is wrong with a tile's result, or None."""
        with _poisoned_memory():
            outputs = self.problem.launch(config)
        for output, exact, allowed in zip(outputs, self.exact, self.allowed, strict=True):
            found = (output[self.problem.rows].float() - exact).abs().max().item()
            if not found <= allowed:  # NaN, too
                return f"wrong: off by {found:.3g}, {allowed:.3g} is allowed"
        return None


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """New memory holds NaN: a tile that leaves a part unwritten would find the right answer of the tile before it there."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns, fills = (
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = fills
