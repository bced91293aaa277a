"""The files of the small Keye: config, tokenizer, chat template and weights, in the layout of the official checkpoints."""

import json
import math
import os
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

import keye_kernels as kk
from keye_kernels.model.checkpoint import destinations
from keye_kernels.processing.prompts import DEFAULT_CHAT_TEMPLATE
from keye_kernels.processing.tokenizer import SPECIAL_TOKENS

from . import world

# 16 to about 25 tokens per image, so that objects cover about as many patches at any image size
PIXELS = {"min_pixels": 12544, "max_pixels": 20000}
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "vision_config": {
        "hidden_size": 144,
        "intermediate_size": 288,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": 168,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "model_type": "siglip_vision_model",
    },
}
TOKEN_IDS = {
    "bos_token_id": "<|endoftext|>",
    "eos_token_id": "<|im_end|>",
    "pad_token_id": "<|endoftext|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}


def build_tokenizer() -> Tokenizer:
    """A tokenizer with one token per word of the questions and answers (with and without a leading space) and one per byte."""
    bytes_to_characters = _byte_characters()
    texts = " ".join(
        [
            *("system user assistant You are a helpful and at an the", " ".join(world.NUMBERS)),
            *(world.WHAT, world.COUNT, world.WHICH_WAY, "what colour is the?", "where is the?"),
            *(" ".join(words) for words in (world.SHAPES, world.COLOURS, world.SIZES)),
            *(" ".join(words) for words in (world.ROWS, world.COLUMNS, world.DIRECTIONS)),
        ]
    )
    words = sorted(set(texts.replace("?", "").split()))
    entries = [bytes_to_characters[byte] for byte in range(256)]
    entries += [space + word for space in ("", bytes_to_characters[ord(" ")]) for word in words if len(space + word) > 1]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(t, special=t.startswith("<|"), normalized=False) for t in SPECIAL_TOKENS])
    return tokenizer


def _byte_characters() -> dict[int, str]:
    """The character of each byte in the byte-level alphabet: printable Latin-1 as is, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256))
    return {byte: chr(byte if byte in printable else 256 + next(others)) for byte in range(256)}


def build_config(tokenizer: Tokenizer) -> dict:
    ids = {name: tokenizer.token_to_id(token) for name, token in TOKEN_IDS.items()}
    fixed = {"architectures": ["KeyeForConditionalGeneration"], "model_type": "Keye", "torch_dtype": "bfloat16"}
    return fixed | SIZES | ids | {"vocab_size": tokenizer.get_vocab_size()}


PROCESSOR_FILES = {
    *("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.json"),
    *("preprocessor_config.json", "generation_config.json"),
}


def write_processor(folder: Path) -> dict:
    """Writes all files except the weights. Returns the content of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    config = build_config(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    ends = [config["eos_token_id"], config["bos_token_id"]]
    files = {
        "config.json": config,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
        },
        "chat_template.json": {"chat_template": DEFAULT_CHAT_TEMPLATE},
        "preprocessor_config.json": PIXELS
        | {
            "patch_size": 14,
            "temporal_patch_size": 1,
            "merge_size": 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "resample": 3,
            "image_processor_type": "SiglipImageProcessor",
            "processor_class": "KeyeProcessor",
        },
        "generation_config.json": {"do_sample": False, "eos_token_id": ends, "pad_token_id": config["pad_token_id"]},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return config


def new_model(config: dict, seed: int) -> kk.Keye:
    """A float32 model with random weights; equal seeds give equal weights.

    Matrices keep the variance of activations at one, and the last matrix of each residual branch is scaled down. The position
    embedding starts as cosines over the image, which make the position known from the first step on.
    """
    torch.manual_seed(seed)
    model = kk.Keye(kk.KeyeConfig.from_dict(config), impl="reference")
    decoder_branches = 2 * config["num_hidden_layers"]
    vision_branches = 2 * config["vision_config"]["num_hidden_layers"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                continue
            std = parameter.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std *= decoder_branches**-0.5
            elif name.endswith(("out_proj.weight", "fc2.weight")):
                std *= vision_branches**-0.5
            elif name.endswith("embed_tokens.weight"):
                std = 0.5
            elif name == "lm_head.weight":
                std = 0.02
            parameter.normal_(std=std)
        table = model.visual.position_embedding.weight
        table.copy_(_cosine_table(math.isqrt(table.shape[0]), table.shape[1]))
    return model


def _cosine_table(side: int, channels: int) -> Tensor:
    """[side², channels]: cosines along rows or columns, with 0.5 to 3 periods per image."""
    rng = random.Random(0)
    position = (torch.arange(side) + 0.5) / side
    row, column = position.repeat_interleave(side)[:, None], position.repeat(side)[:, None]
    periods = torch.arange(channels) // 2 % 6 * 0.5 + 0.5
    phase = torch.tensor([rng.random() for _ in range(channels)])
    axis = torch.where(torch.arange(channels) % 2 == 0, row, column)
    return 0.5 * torch.cos(2 * math.pi * (axis * periods + phase))


def save_weights(model: kk.Keye, weights: dict[str, Tensor], folder: Path) -> None:
    """Writes `weights` (by parameter name) as bfloat16 under Keye's tensor names. The file is replaced atomically."""
    original = {name: parameter.data for name, parameter in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.data = weights[name]
        tensors = {name: view.to(torch.bfloat16).contiguous() for name, view in destinations(model).items()}
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = original[name]
    save_file(tensors, folder / "model.safetensors.part", metadata={"format": "pt"})
    os.replace(folder / "model.safetensors.part", folder / "model.safetensors")
