"""A small random checkpoint in the real layout, and the whole path run on it."""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from .cli import answer_question
from .model import Keye, KeyeConfig
from .model.checkpoint import destinations
from .processing.prompts import DEFAULT_CHAT_TEMPLATE
from .processing.tokenizer import build_byte_tokenizer

PICTURE = Path(__file__).parent / "assets" / "picture.png"
QUESTION = "what is in the picture?"
DEMO_TOKENS = 24
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
PREPROCESSOR = {
    "min_pixels": 3136,
    "max_pixels": 1003520,
    "patch_size": 14,
    "temporal_patch_size": 1,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "image_processor_type": "SiglipImageProcessor",
    "processor_class": "KeyeProcessor",
}


def write_random_checkpoint(folder: Path, *, model_type: str = "Keye", shards: int = 2, seed: int = 0) -> None:
    """Writes a complete checkpoint with random weights: config, sharded safetensors with an index, tokenizer, chat template,
    preprocessor and generation configuration. `folder` is made; existing files in it raise ValueError."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"folder {folder} is not empty; name another, so that nothing is overwritten")
    tokenizer = build_byte_tokenizer()
    ids = {
        f"{name}_token_id": tokenizer.token_to_id(f"<|{token}|>")
        for name, token in (
            ("bos", "endoftext"),
            ("eos", "im_end"),
            ("pad", "endoftext"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
            ("image", "image_pad"),
            ("video", "video_pad"),
        )
    }
    architecture = {"Keye": "KeyeForConditionalGeneration", "KeyeVL1_5": "KeyeVL1_5ForConditionalGeneration"}
    config = (
        SIZES
        | ids
        | {
            "architectures": [architecture[model_type]],
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
        "preprocessor_config.json": PREPROCESSOR,
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


def run_demo(options: argparse.Namespace) -> None:
    """Asks the random model about the bundled picture and prints what happened."""
    options.max_new_tokens = min(options.max_new_tokens, DEMO_TOKENS)
    with tempfile.TemporaryDirectory(prefix="keye-demo-") as scratch:
        folder = Path(scratch) / "random-keye"
        write_random_checkpoint(folder)
        print(
            f"Wrote a random Keye checkpoint in the real layout: {', '.join(sorted(f.name for f in folder.iterdir()))}"
        )
        content = [{"type": "image", "image": str(PICTURE)}, {"type": "text", "text": QUESTION}]
        answer = answer_question(str(folder), content, options, None)
    print(f"Picture:  {PICTURE.name}, {answer['prompt_tokens']} tokens with the question")
    print(f"Question: {QUESTION}")
    print(f"Answer:   {answer['answer']!r}")
    print(f"{answer['new_tokens']} tokens in {answer['seconds']} s.")
    print("The weights are random, so the words mean nothing; what ran is the whole path from picture to text.")
