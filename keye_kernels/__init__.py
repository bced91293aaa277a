"""Keye-VL: Triton kernels, a lean PyTorch model, image and video processing, and integrations with other libraries.

Start with `Keye` (the model), `KeyeProcessor` (its inputs) and `ops` (the operators).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import ops as ops
    from .integrations.patching import PatchReport as PatchReport
    from .integrations.patching import apply_keye_kernels as apply_keye_kernels
    from .integrations.patching import revert_keye_kernels as revert_keye_kernels
    from .model import Keye as Keye
    from .model import KeyeConfig as KeyeConfig
    from .model import KVCache as KVCache
    from .model import TextStreamer as TextStreamer
    from .ops import use_impl as use_impl
    from .processing import KeyeProcessor as KeyeProcessor
    from .processing import process_vision_info as process_vision_info
    from .processing import split_thinking as split_thinking
    from .small import small_model as small_model
    from .small import small_processor as small_processor
    from .warm_up import warmup as warmup

__version__ = "0.1.0"

# Public name -> module that defines it. Imported on first use, so that `import keye_kernels` is fast and needs neither Triton
# nor transformers.
_MODULES = {
    "Keye": "model",
    "KeyeConfig": "model",
    "KVCache": "model",
    "TextStreamer": "model",
    "KeyeProcessor": "processing",
    "PatchReport": "integrations.patching",
    "apply_keye_kernels": "integrations.patching",
    "revert_keye_kernels": "integrations.patching",
    "process_vision_info": "processing",
    "split_thinking": "processing",
    "small_model": "small",
    "small_processor": "small",
    "use_impl": "ops",
    "warmup": "warm_up",
    "ops": "ops",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'keye_kernels' has no attribute {name!r}")
    module = import_module(f".{_MODULES[name]}", __name__)
    value = module if name == "ops" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
