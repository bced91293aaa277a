"""Configuration of a checkpoint, read from its `config.json`."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keye_kernels.editions import PREVIEW, EditionName, edition_of


@dataclass(frozen=True)
class VisionConfig:
    """The SigLIP vision tower. Defaults are those of the released models."""

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

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "VisionConfig":
        """Reads the `vision_config` of a `config.json`. Raises ValueError if this package cannot run the tower."""
        activation = values.get("hidden_act", "gelu_pytorch_tanh")
        if activation != "gelu_pytorch_tanh":
            raise ValueError(f"vision_config.hidden_act must be 'gelu_pytorch_tanh', got {activation!r}")
        return _from_known_fields(cls, values)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def patch_shape(self) -> tuple[int, int, int]:
        return self.num_channels, self.patch_size, self.patch_size

    @property
    def table_side(self) -> int:
        """Number of rows, and of columns, of the square table of learned positions."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class KeyeConfig:
    """The text model, the special tokens and the vision tower. Defaults are those of Keye-VL-8B-Preview."""

    model_type: str = PREVIEW.model_type
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
    max_position_embeddings: int = PREVIEW.context_length
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    vision_start_token_id: int = 151652
    image_token_id: int = 151655
    video_token_id: int = 151656
    torch_dtype: str | None = None
    vision_config: VisionConfig = field(default_factory=VisionConfig)

    @property
    def edition(self) -> EditionName:
        """Name of the edition, "preview" or "1.5"."""
        return edition_of(self.model_type).name

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "KeyeConfig":
        """Reads the `config.json` of a checkpoint.

        Args:
            path: folder of the checkpoint.

        Raises:
            FileNotFoundError: there is no `config.json`.
            ValueError: the file is not valid JSON, or describes a model that this package cannot run.
        """
        file = Path(path) / "config.json"
        if not file.is_file():
            command = "hf download Kwai-Keye/Keye-VL-8B-Preview --local-dir DIR"
            raise FileNotFoundError(f"path must be a Keye checkpoint, but {file} does not exist; download one: `{command}`")
        try:
            return cls.from_dict(json.loads(file.read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not valid JSON: {error}") from error

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "KeyeConfig":
        """Reads the content of a `config.json`.

        Args:
            values: flat, as in the released checkpoints, or with the fields of the text model in `text_config`. Rope is
                described by `rope_scaling`, `rope_parameters` or `rope_theta`.

        Raises:
            ValueError: the model cannot be run by this package.
        """
        model_type = edition_of(values.get("model_type")).model_type
        values = {**values, **(values.get("text_config") or {}), "model_type": model_type}
        rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "mrope"):
            raise ValueError(f"rope_scaling must have type 'mrope' or 'default', got {rope_type!r}")
        for name, expected in (("hidden_act", "silu"), ("attention_bias", False), ("use_sliding_window", False)):
            if values.get(name, expected) != expected:
                raise ValueError(f"{name} must be {expected!r}, got {values[name]!r}")
        values["rope_theta"] = rope.get("rope_theta", values.get("rope_theta", cls.rope_theta))
        values["mrope_section"] = tuple(rope.get("mrope_section", cls.mrope_section))
        values["torch_dtype"] = values.get("dtype", values.get("torch_dtype"))
        values["vision_config"] = VisionConfig.from_dict(values.get("vision_config") or {})
        return _from_known_fields(cls, values)

    def __post_init__(self) -> None:
        if sum(self.mrope_section) * 2 != self.head_dim or len(self.mrope_section) != 3:
            expected = f"three numbers that add up to head_dim/2 = {self.head_dim // 2}"
            raise ValueError(f"mrope_section must be {expected}, got {list(self.mrope_section)}")


def _from_known_fields(cls: type[Any], values: dict[str, Any]) -> Any:
    """An instance of the dataclass `cls` from the entries of `values` that are fields of it and not None."""
    known = {name: values[name] for name in cls.__dataclass_fields__ if values.get(name) is not None}
    return cls(**known)
