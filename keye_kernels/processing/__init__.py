"""Conversations, images and videos to the inputs of a Keye model."""

from .processor import KeyeProcessor
from .prompts import split_thinking
from .vision_info import process_vision_info

__all__ = ["KeyeProcessor", "process_vision_info", "split_thinking"]
