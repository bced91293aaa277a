"""Loads models through an Auto class of transformers."""

import torch
from transformers import AutoModelForImageTextToText

import keye_kernels.auto  # noqa: F401  registers the Auto classes


def load(path, **options):
    """Loads a float32 model."""
    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, **options)
