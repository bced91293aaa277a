"""The lean Keye-VL model, independent of transformers. Start reading at `keye`."""

from .cache import KVCache
from .config import KeyeConfig, VisionConfig
from .generation import TextStreamer
from .keye import Keye, KeyeOutput

__all__ = ["KVCache", "Keye", "KeyeConfig", "KeyeOutput", "TextStreamer", "VisionConfig"]
