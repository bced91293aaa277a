"""Which transformers this package works with."""

import importlib.metadata
import re

OLDEST = (4, 57)


def require_transformers() -> None:
    """ImportError, with the command that mends it, where transformers is missing or older than `OLDEST`."""
    oldest = ".".join(map(str, OLDEST))
    command = f'pip install "transformers>={oldest}"'
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"keye_kernels.auto needs transformers, which is not installed: {command}") from None
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
        raise ImportError(f"keye_kernels.auto needs transformers {oldest} or newer, found {version}: {command}")


def lm_head_plan() -> str:
    """The name of "split by rows, every rank gets all logits" in the tensor-parallel plans of this transformers."""
    return "colwise_rep" if importlib.metadata.version("transformers").startswith("4.") else "colwise_gather_output"
