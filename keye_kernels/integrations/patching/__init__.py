"""Puts this package's operators into models that are already loaded, one instance at a time, and takes them out again."""

from .patch import apply_keye_kernels, revert_keye_kernels
from .report import PatchReport

__all__ = ["PatchReport", "apply_keye_kernels", "revert_keye_kernels"]
