"""The numbers of a checkpoint, read from its own `config.json`."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

EDITIONS: dict[str, Literal["preview", "1.5"]] = {"Keye": "preview", "KeyeVL1_5": "1.5"}


@dataclass(frozen=True)
class VisionConfig:
    """The SigLIP tower; defaults are those of the released models."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 384
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    spatial_merge_size: int = 2
    tokens_per_second: int = 2
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def table_side(self) -> int:
        """Rows (and columns) of the learned grid of positions."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class KeyeConfig:
    """The text model's numbers, special tokens and the tower's configuration; defaults are those of 8B-Preview."""

    model_type: str = "Keye"
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 151936
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    mrope_section: tuple[int, ...] = (16, 24, 24)
    max_position_embeddings: int = 40960
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    vision_start_token_id: int = 151652
    image_token_id: int = 151655
    video_token_id: int = 151656
    torch_dtype: str | None = None
    vision_config: VisionConfig = field(default_factory=VisionConfig)

    @property
    def edition(self) -> Literal["preview", "1.5"]:
        return EDITIONS[self.model_type]

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "KeyeConfig":
        """Reads `path`/config.json. Raises FileNotFoundError, or ValueError for a configuration this package cannot run."""
        file = Path(path) / "config.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"path must be a folder with a Keye checkpoint, but {file} does not exist; "
                "download one first, for instance with `hf download Kwai-Keye/Keye-VL-8B-Preview --local-dir DIR`"
            )
        try:
            return cls.from_dict(json.loads(file.read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not valid JSON: {error}") from error

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "KeyeConfig":
        """Takes the official layouts: flat, or with a nested `text_config`; rope in `rope_scaling` or `rope_parameters`."""
        model_type = values.get("model_type")
        if model_type not in EDITIONS:
            raise ValueError(f"model_type must be one of {', '.join(EDITIONS)}, got {model_type!r}")
        values = {**values, **(values.get("text_config") or {}), "model_type": model_type}
        rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "mrope"):
            raise ValueError(f"rope_scaling must have type 'mrope' or 'default', got {kind!r}")
        for name, expected in (("hidden_act", "silu"), ("attention_bias", False), ("use_sliding_window", False)):
            if values.get(name, expected) != expected:
                raise ValueError(f"{name} must be {expected!r}, got {values[name]!r}")
        vision = values.get("vision_config") or {}
        if vision.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
            raise ValueError(f"vision_config.hidden_act must be 'gelu_pytorch_tanh', got {vision['hidden_act']!r}")
        values["rope_theta"] = rope.get("rope_theta", values.get("rope_theta", cls.rope_theta))
        values["mrope_section"] = tuple(rope.get("mrope_section", cls.mrope_section))
        values["torch_dtype"] = values.get("dtype", values.get("torch_dtype"))
        values["vision_config"] = _take(VisionConfig, vision)
        return _take(cls, values)

    def __post_init__(self) -> None:
        if sum(self.mrope_section) * 2 != self.head_dim or len(self.mrope_section) != 3:
            raise ValueError(
                f"mrope_section must be three numbers adding up to head_dim/2 = {self.head_dim // 2}, "
                f"got {list(self.mrope_section)}"
            )


def _take(cls: type, values: dict[str, Any]) -> Any:
    """An instance of a dataclass from those of `values` that it knows."""
    known = {name: values[name] for name in cls.__dataclass_fields__ if values.get(name) is not None}
    return cls(**known)
