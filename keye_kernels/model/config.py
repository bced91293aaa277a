"""Configuration of a checkpoint, read from its `config.json`."""

import json
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from keye_kernels.editions import PREVIEW, EditionName, edition_of

# Rope computes angles in float32. The error of its kernel is 3e-6 up to here, and large above 2**23.6
MAX_POSITION = 2**23
WEIGHT_DTYPES = ("float32", "bfloat16", "float16", "float64")
# Smallest and largest value of the numbers in `config.json`. Bounds that are integers admit integers only
LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), (1, 2**20)),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), (1, 1024)),
    **dict.fromkeys(("head_dim", "patch_size"), (1, 256)),
    **dict.fromkeys(("num_channels", "spatial_merge_size"), (1, 16)),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps"), (1e-30, 1.0)),
    "num_hidden_layers": (0, 1024),
    "image_size": (1, 2**14),
    "max_position_embeddings": (1, MAX_POSITION),
    "rope_theta": (1e-30, 1e30),
    "initializer_range": (0.0, 1e6),
    "tokens_per_second": (1e-3, 1e3),
}


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Raises ValueError unless `value` is a number from `low` to `high`, an integer if both bounds are."""
    is_integer = isinstance(low, int) and isinstance(high, int)
    is_number = isinstance(value, Integral if is_integer else Real) and not isinstance(value, bool)
    require(is_number and low <= value <= high, name, f"{'an integer' if is_integer else 'a number'} from {low} to {high}", value)


def require(is_valid: bool, name: str, expected: str, value: Any) -> None:
    if not is_valid:
        raise ValueError(f"{name} must be {expected}, got {value!r:.100}")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file, or {} if there is no such file. Raises ValueError for other content."""
    try:
        values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    require(isinstance(values, dict), str(file), "a JSON object", values)
    return values


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

    def __post_init__(self) -> None:
        _check_limits(self, "vision_config.")
        is_multiple = self.hidden_size % (4 * self.num_attention_heads) == 0
        require(is_multiple, "vision_config.hidden_size", "a multiple of 4 * num_attention_heads", self.hidden_size)

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
    """The text model, the special tokens and the vision tower. Defaults are those of Keye-VL-8B-Preview.

    In `from_dict`, that of `max_position_embeddings` depends on the edition.
    """

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
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
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
            ValueError: the file is not valid JSON, or a field, which the message names, describes a model that cannot be run.
        """
        file = Path(path) / "config.json"
        if not file.is_file():
            command = "hf download Kwai-Keye/Keye-VL-8B-Preview --local-dir DIR"
            raise FileNotFoundError(f"path must be a Keye checkpoint, but {file} does not exist; download one: `{command}`")
        values = read_json(file)
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "KeyeConfig":
        """Reads the content of a `config.json`.

        Args:
            values: flat, as in the released checkpoints, or with the fields of the text model in `text_config`. Rope is
                described by `rope_scaling`, `rope_parameters` or `rope_theta`.

        Raises:
            ValueError: the model cannot be run by this package.
        """
        edition = edition_of(values.get("model_type"))
        values = {**values, **_object(values, "text_config"), "model_type": edition.model_type}
        if values.get("max_position_embeddings") is None:
            values["max_position_embeddings"] = edition.context_length
        rope = {**_object(values, "rope_scaling"), **_object(values, "rope_parameters")}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "mrope"):
            raise ValueError(f"rope_scaling must have type 'mrope' or 'default', got {rope_type!r}")
        for name, expected in (("hidden_act", "silu"), ("attention_bias", False), ("use_sliding_window", False)):
            if values.get(name, expected) != expected:
                raise ValueError(f"{name} must be {expected!r}, got {values[name]!r}")
        values["rope_theta"] = rope.get("rope_theta", values.get("rope_theta", cls.rope_theta))
        values["mrope_section"] = rope.get("mrope_section")
        values["torch_dtype"] = values.get("dtype", values.get("torch_dtype"))
        values["vision_config"] = VisionConfig.from_dict(_object(values, "vision_config"))
        return _from_known_fields(cls, values)

    def __post_init__(self) -> None:
        _check_limits(self)
        for name in ("vision_start_token_id", "image_token_id", "video_token_id", "pad_token_id"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0, self.vocab_size - 1)
        pairs, sizes = self.head_dim / 2, self.mrope_section
        is_split = _are_integers(sizes) and len(sizes) == 3 and min(sizes) >= 0 and sum(sizes) == pairs
        require(is_split, "mrope_section", f"three numbers that add up to head_dim/2 = {pairs:g}", sizes)
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        require(heads % kv_heads == 0, "num_attention_heads", f"a multiple of num_key_value_heads = {kv_heads}", heads)
        require(isinstance(self.tie_word_embeddings, bool), "tie_word_embeddings", "true or false", self.tie_word_embeddings)
        is_dtype = self.torch_dtype is None or str(self.torch_dtype).removeprefix("torch.") in WEIGHT_DTYPES
        require(is_dtype, "torch_dtype", f"one of {', '.join(WEIGHT_DTYPES)}", self.torch_dtype)
        ends = self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)
        require(ends == (None,) or _are_integers(ends), "eos_token_id", "an integer or a list of integers", self.eos_token_id)
        for token in ends if self.eos_token_id is not None else ():
            check_number("eos_token_id", token, 0, self.vocab_size - 1)
        special = (self.vision_start_token_id, self.image_token_id, self.video_token_id)
        names = "vision_start_token_id, image_token_id and video_token_id"
        require(len({*special}) == 3, names, "three different tokens", special)


def _are_integers(values: Any) -> bool:
    return isinstance(values, (tuple, list)) and all(type(value) is int for value in values)


def _check_limits(config: Any, prefix: str = "") -> None:
    for name in config.__dataclass_fields__.keys() & LIMITS.keys():
        check_number(prefix + name, getattr(config, name), *LIMITS[name])


def _object(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The JSON object `values[name]`; {} if it is null or missing."""
    value = values.get(name)
    require(value is None or isinstance(value, dict), name, "a JSON object", value)
    return value or {}


def _from_known_fields(cls: type[Any], values: dict[str, Any]) -> Any:
    """An instance of the dataclass `cls` from the entries of `values` that are fields of it and not None."""
    known = {name: values[name] for name in cls.__dataclass_fields__ if values.get(name) is not None}
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in known.items()})
