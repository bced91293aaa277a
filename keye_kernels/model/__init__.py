"""The lean Keye-VL model, independent of transformers. Start reading at `keye`."""

from .cache import KeyeOutput, KVCache
from .config import KeyeConfig, VisionConfig
from .generation import TextStreamer
from .keye import Keye

__all__ = ["KVCache", "Keye", "KeyeConfig", "KeyeOutput", "TextStreamer", "VisionConfig"]
