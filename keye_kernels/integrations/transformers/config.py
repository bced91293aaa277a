"""The configuration classes for transformers. The fields are described in `keye_kernels.model.config`."""

from typing import Any

from transformers import PretrainedConfig

from keye_kernels.editions import PREVIEW, V1_5
from keye_kernels.model.config import KeyeConfig as LeanConfig
from keye_kernels.model.config import VisionConfig as LeanVisionConfig

VISION_DEFAULTS = LeanVisionConfig()
DEFAULTS = LeanConfig()


class KeyeVisionConfig(PretrainedConfig):
    """Configuration of the vision tower."""

    model_type = "keye_vision"
    base_config_key = "vision_config"

    def __init__(
        self,
        hidden_size: int = VISION_DEFAULTS.hidden_size,
        intermediate_size: int = VISION_DEFAULTS.intermediate_size,
        num_hidden_layers: int = VISION_DEFAULTS.num_hidden_layers,
        num_attention_heads: int = VISION_DEFAULTS.num_attention_heads,
        num_channels: int = VISION_DEFAULTS.num_channels,
        image_size: int = VISION_DEFAULTS.image_size,
        patch_size: int = VISION_DEFAULTS.patch_size,
        hidden_act: str = "gelu_pytorch_tanh",
        layer_norm_eps: float = VISION_DEFAULTS.layer_norm_eps,
        spatial_merge_size: int = VISION_DEFAULTS.spatial_merge_size,
        tokens_per_second: int = VISION_DEFAULTS.tokens_per_second,
        rope_theta: float = VISION_DEFAULTS.rope_theta,
        initializer_range: float = DEFAULTS.initializer_range,
        **kwargs: Any,
    ):
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_channels = num_channels
        self.image_size = image_size
        self.patch_size = patch_size
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.spatial_merge_size = spatial_merge_size
        self.tokens_per_second = tokens_per_second
        self.rope_theta = rope_theta
        self.initializer_range = initializer_range
        # Checkpoints have "siglip_vision_model" here, which is another tower in transformers
        kwargs.pop("model_type", None)
        super().__init__(**kwargs)

    def lean(self) -> LeanVisionConfig:
        """The configuration of the lean model's tower."""
        return LeanVisionConfig.from_dict(self.to_dict())


class KeyeConfig(PretrainedConfig):
    """Keye-VL-8B-Preview. Flat, as in the checkpoints: the fields of the text model are next to `vision_config`."""

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

    def __init__(
        self,
        vocab_size: int = DEFAULTS.vocab_size,
        hidden_size: int = DEFAULTS.hidden_size,
        intermediate_size: int = DEFAULTS.intermediate_size,
        num_hidden_layers: int = DEFAULTS.num_hidden_layers,
        num_attention_heads: int = DEFAULTS.num_attention_heads,
        num_key_value_heads: int = DEFAULTS.num_key_value_heads,
        head_dim: int = DEFAULTS.head_dim,
        hidden_act: str = "silu",
        max_position_embeddings: int = DEFAULTS.max_position_embeddings,
        initializer_range: float = DEFAULTS.initializer_range,
        rms_norm_eps: float = DEFAULTS.rms_norm_eps,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        rope_parameters: dict[str, Any] | None = None,
        rope_scaling: dict[str, Any] | None = None,
        rope_theta: float | None = None,
        vision_start_token_id: int = DEFAULTS.vision_start_token_id,
        image_token_id: int = DEFAULTS.image_token_id,
        video_token_id: int = DEFAULTS.video_token_id,
        vision_config: dict[str, Any] | KeyeVisionConfig | None = None,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        self.vision_start_token_id = vision_start_token_id
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        self.vision_config = (
            vision_config if isinstance(vision_config, KeyeVisionConfig) else KeyeVisionConfig(**(vision_config or {}))
        )
        rope = {**(rope_scaling or {}), **(rope_parameters or {})}
        # Before transformers' own check, which accepts types of rope that Keye does not have
        LeanConfig.from_dict({"model_type": self.model_type, "head_dim": head_dim, "rope_parameters": rope})
        self.rope_parameters = {
            # "mrope" is unscaled rope with the pairs divided among three axes
            "rope_type": "default",
            "rope_theta": rope.get("rope_theta", DEFAULTS.rope_theta if rope_theta is None else rope_theta),
            "mrope_section": list(rope.get("mrope_section", DEFAULTS.mrope_section)),
        }
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        self.lean()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Also reads the nested layout, with the fields of the text model in `text_config`."""
        nested = {name: value for name, value in (config_dict.get("text_config") or {}).items() if name != "model_type"}
        flat = {name: value for name, value in config_dict.items() if name != "text_config"}
        return super().from_dict({**flat, **nested}, **kwargs)

    def lean(self) -> LeanConfig:
        """The configuration of the lean model.

        Raises:
            ValueError: the model cannot be run by this package, for instance because its rope is scaled.
        """
        return LeanConfig.from_dict(self.to_dict())


class KeyeVL1_5Config(KeyeConfig):
    """Keye-VL-1.5-8B."""

    model_type = V1_5.model_type

    # transformers 5 turns configurations into dataclasses and generates an __init__ for those that define none
    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)


CONFIGS = {config.model_type: config for config in (KeyeConfig, KeyeVL1_5Config)}
