"""The supported range of transformers, and differences between its versions."""

import importlib.metadata

from keye_kernels.requirements import require


def require_transformers() -> None:
    """Raises ImportError, with the command that fixes it, if transformers is missing or too old."""
    require("transformers", needed_by="keye_kernels.auto")


def lm_head_plan() -> str:
    """The tensor-parallel plan "split by columns, gather the logits on every rank" under its name in this transformers."""
    return "colwise_rep" if importlib.metadata.version("transformers").startswith("4.") else "colwise_gather_output"
