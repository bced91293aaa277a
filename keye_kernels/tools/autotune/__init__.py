"""`keye-kernels autotune`: times the launch configs of each kernel on this GPU and saves the fastest in a table."""

from .command import add_arguments, run

__all__ = ["add_arguments", "run"]
