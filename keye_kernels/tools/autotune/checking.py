"""Compares the result of a launch config with the reference."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from keye_kernels.triton.launch_config import Config
from keye_kernels.triton.spec import TuningProblem


class Checker:
    """Compares launches on one problem with the reference in float32.

    The allowed error is twice the error of the reference in the dtype itself, plus two eps of the largest value, as in the tests
    of the kernels.
    """

    def __init__(self, problem: TuningProblem, dtype: torch.dtype):
        self.problem, self.exact = problem, problem.expect(torch.float32)
        eps = torch.finfo(dtype).eps
        self.allowed = [
            2 * ((eager.float() - exact).abs().max() + eps * exact.abs().max()).item()
            for eager, exact in zip(problem.expect(dtype), self.exact, strict=True)
        ]

    def error(self, config: Config) -> str | None:
        """What is wrong with the result of a config; None if nothing is."""
        with _poisoned_memory():
            outputs = self.problem.launch(config)
        for output, exact, allowed in zip(outputs, self.exact, self.allowed, strict=True):
            found = (output[self.problem.rows].float() - exact).abs().max().item()
            if not found <= allowed:  # also true for NaN
                return f"wrong result: error {found:.3g}, allowed {allowed:.3g}"
        return None


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """New memory holds NaN: elements that a config leaves unwritten would otherwise hold the right result of an earlier one."""
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = fills
