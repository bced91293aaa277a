"""A small checkpoint with random weights in the released layout: shards, tokenizer and all configuration files."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from examples.train_small.checkpoint import TOKEN_IDS
from keye_kernels.editions import edition_of
from keye_kernels.model import Keye, KeyeConfig
from keye_kernels.model.checkpoint import destinations
from keye_kernels.processing.prompts import DEFAULT_CHAT_TEMPLATE
from keye_kernels.processing.tokenizer import build_byte_tokenizer
from tests.helpers.small_tokenizer import PREPROCESSOR

# Real head dims (72 and 128), everything else small
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rope_theta": 1_000_000,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {
        "hidden_size": 144,
        "intermediate_size": 304,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 384,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "model_type": "siglip_vision_model",
    },
}


def write_random_checkpoint(folder: Path, *, model_type: str = "Keye", shards: int = 2, seed: int = 0) -> None:
    """Creates `folder` and writes a complete checkpoint with random weights.

    Raises:
        ValueError: the folder is not empty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"folder {folder} is not empty")
    tokenizer = build_byte_tokenizer()
    ids = {name: tokenizer.token_to_id(token) for name, token in TOKEN_IDS.items()}
    config = (
        SIZES
        | ids
        | {
            "architectures": [edition_of(model_type).architecture],
            "model_type": model_type,
            "vocab_size": tokenizer.get_vocab_size(),
            "torch_dtype": "float32",
        }
    )
    torch.manual_seed(seed)
    weights = {name: view.clone() for name, view in destinations(Keye(KeyeConfig.from_dict(config))).items()}
    names, index = sorted(weights), {"metadata": {"total_size": 0}, "weight_map": {}}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name].contiguous() for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(part, file)
        index["metadata"]["total_size"] += sum(tensor.nbytes for tensor in part.values())
    tokenizer.save(str(folder / "tokenizer.json"))
    texts = {
        "config.json": config,
        "model.safetensors.index.json": index,
        "tokenizer_config.json": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "model_max_length": 4096},
        "chat_template.json": {"chat_template": DEFAULT_CHAT_TEMPLATE},
        "preprocessor_config.json": PREPROCESSOR
        | {"resample": 3, "image_processor_type": "SiglipImageProcessor", "processor_class": "KeyeProcessor"},
        "generation_config.json": {
            "do_sample": True,
            "temperature": 0.6,
            "top_p": 0.95,
            "top_k": 20,
            "eos_token_id": [ids["eos_token_id"], ids["bos_token_id"]],
            "pad_token_id": ids["pad_token_id"],
        },
    }
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
