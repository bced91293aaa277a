"""Patches loaded models to run this package's operators. Start reading at `patch`; the supported classes are in `families`."""

from .patch import apply_keye_kernels, revert_keye_kernels
from .report import ModuleReport, PatchReport

__all__ = ["ModuleReport", "PatchReport", "apply_keye_kernels", "revert_keye_kernels"]
