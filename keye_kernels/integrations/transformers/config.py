"""The configuration classes for transformers. The fields and their limits are described in `keye_kernels.model.config`."""

from dataclasses import asdict
from typing import Any

from transformers import PretrainedConfig

from keye_kernels.editions import PREVIEW, V1_5
from keye_kernels.model.config import KeyeConfig as LeanConfig
from keye_kernels.model.config import VisionConfig as LeanVisionConfig

# The fields and their defaults, which are those of the lean model's configuration
TEXT_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("vision_start_token_id", "image_token_id", "video_token_id"),
)
TEXT_DEFAULTS = {name: getattr(LeanConfig, name) for name in TEXT_FIELDS} | {"hidden_act": "silu", "use_cache": True}
VISION_DEFAULTS = asdict(LeanVisionConfig())
VISION_DEFAULTS |= {"hidden_act": "gelu_pytorch_tanh", "initializer_range": LeanConfig.initializer_range}


class KeyeVisionConfig(PretrainedConfig):
    """Configuration of the vision tower. `kwargs` are the fields in `VISION_DEFAULTS`, and those of `PretrainedConfig`."""

    model_type = "keye_vision"
    base_config_key = "vision_config"

    def __init__(self, **kwargs: Any):
        for name, default in VISION_DEFAULTS.items():
            setattr(self, name, kwargs.pop(name, default))
        # Checkpoints have "siglip_vision_model" here, which is another tower in transformers
        kwargs.pop("model_type", None)
        super().__init__(**kwargs)

    def lean(self) -> LeanVisionConfig:
        """The configuration of the lean model's tower. Raises ValueError if this package cannot run the tower."""
        return LeanVisionConfig.from_dict(self.to_dict())


class KeyeConfig(PretrainedConfig):
    """Keye-VL-8B-Preview. Flat, as in the checkpoints: the fields of the text model are next to `vision_config`.

    `kwargs` are the fields in `TEXT_DEFAULTS`, those that describe rope, and those of `PretrainedConfig`. Raises ValueError
    if this package cannot run the model, for instance because its rope is scaled.
    """

    model_type = PREVIEW.model_type
    sub_configs = {"vision_config": KeyeVisionConfig}  # noqa: RUF012 - transformers reads a class attribute
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    ignore_keys_at_rope_validation = {"mrope_section"}  # noqa: RUF012
    base_model_tp_plan = {  # noqa: RUF012
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    def __init__(self, vision_config: dict[str, Any] | KeyeVisionConfig | None = None, **kwargs: Any):
        if not isinstance(vision_config, KeyeVisionConfig):
            vision_config = KeyeVisionConfig(**(vision_config or {}))
        self.vision_config = vision_config
        # Before transformers' own check, which accepts types of rope that Keye does not have
        lean = LeanConfig.from_dict({**kwargs, "model_type": self.model_type, "vision_config": vision_config.to_dict()})
        kwargs = {name: value for name, value in kwargs.items() if name not in ("rope_scaling", "rope_parameters", "rope_theta")}
        self.rope_parameters = {
            "rope_type": "default",  # "mrope" is unscaled rope with the pairs divided among three axes
            "rope_theta": lean.rope_theta,
            "mrope_section": list(lean.mrope_section),
        }
        # This default depends on the edition
        for name, default in {**TEXT_DEFAULTS, "max_position_embeddings": lean.max_position_embeddings}.items():
            setattr(self, name, kwargs.pop(name, default))
        super().__init__(**{"tie_word_embeddings": False, **kwargs})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Also reads the nested layout, with the fields of the text model in `text_config`."""
        nested = {name: value for name, value in (config_dict.get("text_config") or {}).items() if name != "model_type"}
        flat = {name: value for name, value in config_dict.items() if name != "text_config"}
        return super().from_dict({**flat, **nested}, **kwargs)

    def lean(self) -> LeanConfig:
        """The configuration of the lean model. Raises ValueError if a field that was changed no longer allows it."""
        return LeanConfig.from_dict(self.to_dict())


class KeyeVL1_5Config(KeyeConfig):
    """Keye-VL-1.5-8B."""

    model_type = V1_5.model_type

    # transformers 5 turns configurations into dataclasses and generates an __init__ for those that define none
    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)


CONFIGS = {config.model_type: config for config in (KeyeConfig, KeyeVL1_5Config)}
