"""The lean model: read `keye` first, then `vision`, `projector`, `decoder`, `positions`."""

from .cache import KVCache
from .config import KeyeConfig, VisionConfig
from .generation import TextStreamer
from .keye import Keye, KeyeOutput

__all__ = ["KVCache", "Keye", "KeyeConfig", "KeyeOutput", "TextStreamer", "VisionConfig"]
