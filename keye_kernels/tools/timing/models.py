"""Models for the benchmarks: a Keye of real or small size with random weights, and its counterparts on the same weights."""

import gc
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import save_file

from keye_kernels.model import Keye, KeyeConfig, VisionConfig
from keye_kernels.model.checkpoint import allocate, destinations

from .baseline import Baseline
from .peers import TRANSFORMERS, Unavailable

# Length of the noise that is copied into all weights. Odd, so that no two rows of a matrix are equal.
NOISE_LENGTH = (1 << 24) - 3
SMALL = KeyeConfig(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=512,
    tie_word_embeddings=True,
    vision_start_token_id=500,
    image_token_id=501,
    video_token_id=502,
    vision_config=VisionConfig(hidden_size=144, intermediate_size=304, num_hidden_layers=2, num_attention_heads=2),
)


def make_config(*, small: bool, vision_layers: int | None = None, decoder_layers: int | None = None) -> KeyeConfig:
    """A config of Keye-VL-8B-Preview or of a small model, with fewer layers if given.

    The head is tied to the embedding, which saves 2.5 GB. Without decoder layers the vocabulary is small as well.
    """
    config = SMALL if small else KeyeConfig(tie_word_embeddings=True)
    if vision_layers is not None:
        config = replace(config, vision_config=replace(config.vision_config, num_hidden_layers=vision_layers))
    if decoder_layers is not None:
        config = replace(config, num_hidden_layers=decoder_layers)
    if decoder_layers != 0:
        return config
    return replace(config, vocab_size=8, vision_start_token_id=5, image_token_id=6, video_token_id=7)


@lru_cache(maxsize=1)
def build_model(config: KeyeConfig, dtype: torch.dtype, device: torch.device) -> Keye:
    """A model with random weights. The last model is cached, the one before it is freed."""
    gc.collect()
    with torch.device("meta"):
        model = Keye(config)
    allocate(model, dtype, device)
    model._tie_embeddings()
    # Copying one block of noise is much faster than generating 8 billion random numbers
    generator = torch.Generator().manual_seed(0)
    noise = (torch.randn(NOISE_LENGTH, generator=generator) * config.initializer_range).to(device, dtype)
    start = 0
    for name, parameter in model.named_parameters():
        flat = parameter.data.view(-1)
        if "norm" in name and name.endswith("weight"):
            flat.fill_(1)
            continue
        while len(flat):
            count = min(len(flat), NOISE_LENGTH - start)
            flat[:count] = noise[start : start + count]
            flat, start = flat[count:], (start + count) % NOISE_LENGTH
    return model.eval()


_transformers_models: WeakKeyDictionary = WeakKeyDictionary()


def transformers_model(model: Keye) -> torch.nn.Module:
    """The transformers model of keye_kernels with SDPA, made once for each model. It shares the weights of `model`.

    Raises:
        Unavailable: transformers cannot be imported.
    """
    if model in _transformers_models:
        return _transformers_models[model]
    try:
        from keye_kernels.integrations.transformers.config import KeyeConfig as TransformersConfig
        from keye_kernels.integrations.transformers.modeling import KeyeForConditionalGeneration
    except ImportError as error:
        raise Unavailable(f"{TRANSFORMERS}: the import failed ({error}); pip install transformers") from error
    with torch.device("meta"):
        other = KeyeForConditionalGeneration._from_config(
            TransformersConfig(**config_json(model.config)), attn_implementation="sdpa"
        )
    other.load_state_dict(Baseline(model).weights, assign=True)
    _transformers_models[model] = other.eval()
    return other


def config_json(config: KeyeConfig) -> dict:
    """The content of a checkpoint's config.json."""
    fields = asdict(config)
    del fields["torch_dtype"]
    sections, theta = list(fields.pop("mrope_section")), fields.pop("rope_theta")
    rope = {"type": "mrope", "mrope_section": sections}
    return fields | {"rope_theta": theta, "rope_scaling": rope, "architectures": ["KeyeForConditionalGeneration"]}


@contextmanager
def saved_checkpoint(model: Keye) -> Iterator[Path]:
    """A temporary folder with a checkpoint of the model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        dtype = str(model.dtype).removeprefix("torch.")
        fields = config_json(model.config) | {"torch_dtype": dtype}
        (path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
        tensors = {name: view.contiguous() for name, view in destinations(model).items()}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        yield path
