"""Messages, prompts and random images for tests of the processor."""

import numpy as np
from PIL import Image

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


def user(*parts):
    """A conversation of one user turn with these parts."""
    return [{"role": "user", "content": list(parts)}]


def user_videos(*options):
    """A conversation of one user turn with a video per argument: its source and options."""
    return user(*({"type": "video", **part} for part in options))


def text_part(text):
    """A text part of a message."""
    return {"type": "text", "text": text}


def random_image(height=56, width=84, seed=0, mode="RGB"):
    """An RGB or RGBA image of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels)
