"""`keye-kernels autotune`: which tile each kernel should use on a device, timed there or, without one, ranked."""

from .command import add_arguments, run

__all__ = ["add_arguments", "run"]
