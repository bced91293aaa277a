"""What a checkpoint is: edition, sizes, dtypes, parameters, memory, and how its tensors differ from its config.json."""

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from .checkpoint import STORED_DTYPES, StoredTensor, compare_tensors, first_of_each_kind, is_unused, stored_tensors
from .checks import check_dtype
from .config import KeyeConfig
from .keye import Keye

PARTS = {"vision tower": "visual.", "projector": "mlp_AR.", "text model": "model.layers.", "embeddings and head": ""}
OTHER_FILES = ("generation_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class CheckpointSummary:
    """Of the checkpoint in the folder `path`; no weights are loaded."""

    path: Path
    config: KeyeConfig
    parameters: dict[str, int]  # numbers by part of the model
    stored: dict[str, StoredTensor]
    dtype: torch.dtype  # of the parameters, if loaded with dtype="auto"
    problems: list[str]  # missing, unexpected and unsuitable tensors

    @classmethod
    def read(cls, path: str | Path) -> "CheckpointSummary":
        """Reads the configuration and the headers of the weights. Raises the errors of `Keye.from_pretrained` for files."""
        path = Path(path)
        config = KeyeConfig.from_pretrained(path)
        with torch.device("meta"):
            model = Keye(config)
        parameters = dict.fromkeys(PARTS, 0)
        for name, parameter in model.named_parameters():
            parameters[next(part for part, prefix in PARTS.items() if name.startswith(prefix))] += parameter.numel()
        stored = stored_tensors(path)
        embedding = stored.get("model.embed_tokens.weight")
        dtype = config.torch_dtype or (STORED_DTYPES.get(embedding.dtype) if embedding else None) or torch.bfloat16
        return cls(path, config, parameters, stored, check_dtype(dtype), compare_tensors(model, stored))

    def to_text(self, context_length: int | None = None) -> str:
        """Formats a list of all facts. `context_length`: tokens for which the cache is computed. Default: that of the model."""
        config, vision = self.config, self.config.vision_config
        context = context_length or config.max_position_embeddings
        cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * self.dtype.itemsize
        total = sum(self.parameters.values())
        missing = [name for name in OTHER_FILES if not (self.path / name).is_file()]
        rows = {
            "edition": f"{config.edition} (model_type {config.model_type})",
            "text model": f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, MLP {config.intermediate_size}, "
            f"{config.num_attention_heads} heads and {config.num_key_value_heads} key/value heads of {config.head_dim}, "
            f"vocabulary {config.vocab_size}, context {config.max_position_embeddings}",
            "vision tower": f"{vision.num_hidden_layers} layers, hidden size {vision.hidden_size}, "
            f"MLP {vision.intermediate_size}, {vision.num_attention_heads} heads of {vision.head_dim}, "
            f"patches of {vision.patch_size} x {vision.patch_size}",
            "parameters": f"{_millions(total)} ({', '.join(f'{part} {_millions(n)}' for part, n in self.parameters.items())})",
            "stored": self._stored(),
            "memory": f"weights {_size(total * self.dtype.itemsize)} in {str(self.dtype).removeprefix('torch.')}, "
            f"key/value cache {_size(cache)} per token, {_size(cache * context)} for {context} tokens",
            "other files": f"without {', '.join(missing)}" if missing else "complete",
            "tensors": f"{len(self.problems)} problems" if self.problems else "as in config.json",
        }
        problems = [f"  {text}" for text in first_of_each_kind(self.problems)]
        return "\n".join([*(f"{name:12}  {text}" for name, text in rows.items()), *problems])

    def _stored(self) -> str:
        files = {tensor.file for tensor in self.stored.values()}
        counts = Counter(tensor.dtype for tensor in self.stored.values())
        unused = sum(is_unused(name, self.config) for name in self.stored)
        numbers = sum(prod(tensor.shape) for tensor in self.stored.values())
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in counts.most_common())
        return (
            f"{len(self.stored)} tensors ({dtypes}; {unused} not used for inference), {_millions(numbers)} numbers, "
            f"{len(files)} file{'s' * (len(files) != 1)}, {_size(sum(file.stat().st_size for file in files))}"
        )


def _millions(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.2f} million"


def _size(nbytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} bytes"
