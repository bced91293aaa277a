"""The files that a processor reads from a checkpoint, with a byte tokenizer."""

import json
from pathlib import Path
from typing import Any

from keye_kernels.editions import EDITIONS
from keye_kernels.processing.tokenizer import build_byte_tokenizer

PREPROCESSOR = {
    "min_pixels": 3136,
    "max_pixels": 1003520,
    "patch_size": 14,
    "temporal_patch_size": 1,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def write_processor_files(folder: Path, edition: str, **preprocessor: Any) -> Path:
    """Writes config, preprocessor configuration and tokenizer of ``edition`` into ``folder`` and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    build_byte_tokenizer().save(str(folder / "tokenizer.json"))
    files = {
        "config.json": {"model_type": EDITIONS[edition].model_type},
        "preprocessor_config.json": {**PREPROCESSOR, **preprocessor},
        "tokenizer_config.json": {"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder
