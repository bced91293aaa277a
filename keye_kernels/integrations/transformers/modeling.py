"""Keye as a transformers model: the lean model's parts under the checkpoint's names. Symbols: B rows, S tokens of a row."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from keye_kernels import ops
from keye_kernels.geometry import VisionBatch
from keye_kernels.model.checkpoint import UNUSED
from keye_kernels.model.decoder import prompt_segments
from keye_kernels.model.positions import check_placeholders, inverse_frequencies, rope_index

from .attention import NAME, register_attention
from .config import KeyeConfig, KeyeVisionConfig, KeyeVL1_5Config
from .generation import PICTURES_NEED_IDS, KeyeGenerationMixin, tokens_or_text
from .layers import PatchEmbedding, Projector, TextLayer, VisionLayer
from .versions import lm_head_plan

register_attention()
# transformers 4 wants to be told where in the cache the tokens go
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth")
MASK_TAKES_CACHE_POSITION = "cache_position" in inspect.signature(create_causal_mask).parameters


@dataclass
class KeyeOutput(CausalLMOutputWithPast):
    """As of any causal model, and `rope_deltas` [B, 1], what to add to a token's place to get its position."""

    rope_deltas: Tensor | None = None


class KeyePreTrainedModel(PreTrainedModel):
    config_class = KeyeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # The tower stays on one device: its layers share the geometry of the batch
    _no_split_modules = ["KeyeVisionTransformer", "TextLayer"]  # noqa: RUF012 - transformers reads class attributes
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [name.replace(".", r"\.") for name in UNUSED]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As everywhere in transformers, from safetensors only.

        Raises: ValueError for a checkpoint that carries pickles; ImportError for flash-attn that is not installed.
        """
        folder = Path(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "")
        pickled = any(any(folder.glob(name)) for name in PICKLES) and not any(folder.glob("model*.safetensors"))
        if pickled or kwargs.pop("use_safetensors", None) is False:
            raise ValueError(
                f"{pretrained_model_name_or_path}: pickled weights can run code and are refused; convert them to safetensors"
            )
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, use_safetensors=True, **kwargs)
        except ImportError as error:
            if "flash" not in str(error).lower():
                raise
            message = str(error).rstrip(". \n")
            raise ImportError(f'{message}; pass attn_implementation="keye", which needs no flash-attn') from error


class KeyeVisionEmbeddings(nn.Module):
    def __init__(self, config: KeyeVisionConfig):
        super().__init__()
        self.table_side = config.image_size // config.patch_size
        self.patch_embedding = PatchEmbedding(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Embedding(self.table_side**2, config.hidden_size)

    def forward(self, pixel_values: Tensor, batch: VisionBatch) -> Tensor:
        """[T, 3, 14, 14] in raster order to [T, C] with learned positions, in the order of `batch`."""
        pixels = pixel_values.to(self.patch_embedding.weight.dtype)[batch.raster_index]
        x = self.patch_embedding(pixels).flatten(1)
        table = self.position_embedding(torch.arange(self.table_side**2, device=x.device))
        return ops.position_embedding_2d(x, table, batch)


class KeyeVisionEncoder(nn.Module):
    def __init__(self, config: KeyeVisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))


class KeyeVisionTransformer(nn.Module):
    def __init__(self, config: KeyeVisionConfig, segment_by_frame: bool):
        super().__init__()
        self.config, self.segment_by_frame = config, segment_by_frame
        self.embeddings = KeyeVisionEmbeddings(config)
        self.encoder = KeyeVisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, VisionBatch]:
        """Features [T, C] of patches [T, 3, 14, 14] in raster order, and the batch in whose (block) order they stand."""
        batch = VisionBatch.build(
            grid_thw,
            pixel_values.shape[0],
            table_side=self.embeddings.table_side,
            merge_size=self.config.spatial_merge_size,
            segment_by_frame=self.segment_by_frame,
            device=pixel_values.device,
        )
        pairs = self.config.hidden_size // self.config.num_attention_heads // 4
        inv_freq = inverse_frequencies(10000.0, pairs, pixel_values.device)
        x = self.embeddings(pixel_values, batch)
        for layer in self.encoder.layers:
            x = layer(x, batch, inv_freq)
        return self.post_layernorm(x), batch


class KeyeVisionModel(KeyePreTrainedModel):
    """The tower. Must agree with `SiglipVisionModel` of the official code (specification of 1.5, section 4)."""

    config_class = KeyeVisionConfig
    main_input_name = "pixel_values"
    _tp_plan = {  # noqa: RUF012
        "vision_model.encoder.layers.*.self_attn.q_proj": "colwise",
        "vision_model.encoder.layers.*.self_attn.k_proj": "colwise",
        "vision_model.encoder.layers.*.self_attn.v_proj": "colwise",
        "vision_model.encoder.layers.*.self_attn.out_proj": "rowwise",
        "vision_model.encoder.layers.*.mlp.fc1": "colwise",
        "vision_model.encoder.layers.*.mlp.fc2": "rowwise",
    }

    def __init__(self, config: KeyeVisionConfig, segment_by_frame: bool):
        super().__init__(config)
        self.vision_model = KeyeVisionTransformer(config, segment_by_frame)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.embeddings.patch_embedding

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, VisionBatch]:
        return self.vision_model(pixel_values, grid_thw)


class KeyeTextModel(KeyePreTrainedModel):
    """The decoder. Must agree with `Qwen3Model` under 3D rope (specification of 1.5, sections 7 and 8)."""

    def __init__(self, config: KeyeConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TextLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Embeddings [B, S, hidden] at positions [3, B, S]; the mask is [B, all tokens so far], or one made by `generate`."""
        rows, length = inputs_embeds.shape[:2]
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if MASK_TAKES_CACHE_POSITION and kwargs.get("cache_position") is None:
            kwargs["cache_position"] = torch.arange(past, past + length, device=inputs_embeds.device)
        if self.config._attn_implementation == NAME and past == 0 and _is_contiguous(attention_mask):
            kwargs |= {"cu_seq_lens_q": prompt_segments(attention_mask), "max_length_q": length}
        batch = {
            "attention_mask": self._causal_mask(inputs_embeds, attention_mask, past_key_values, kwargs),
            "position_ids": position_ids.expand(3, rows, -1).flatten(1),
            "inv_freq": inverse_frequencies(
                self.config.rope_parameters["rope_theta"], self.config.head_dim // 2, inputs_embeds.device
            ),
            "past_key_values": past_key_values,
        }
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        x, states, attentions = inputs_embeds, [], []
        for layer in self.layers:
            if output_hidden_states:
                states.append(x)
            x, weights = layer(x, **batch, **kwargs)
            if output_attentions:
                attentions.append(weights)
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*states, x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def _causal_mask(self, embeds: Tensor, mask: Tensor | None, cache: Cache | None, kwargs: dict[str, Any]) -> Any:
        if MASK_TAKES_CACHE_POSITION:
            return create_causal_mask(self.config, embeds, mask, kwargs["cache_position"], cache)
        return create_causal_mask(self.config, embeds, mask, cache)


def _is_contiguous(attention_mask: Any) -> bool:
    """Whether this is a mask [B, S] in each row of which the tokens stand together. Reads values: once a prompt."""
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return False
    starts = F.pad(attention_mask.bool().int(), (1, 0)).diff(dim=1) > 0
    return bool((starts.sum(1) <= 1).all())


class KeyeForConditionalGeneration(KeyeGenerationMixin, KeyePreTrainedModel, GenerationMixin):
    """Keye-VL-8B-Preview: tower, projector and decoder, each once, under the names of the checkpoint."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": lm_head_plan(), "mlp_AR.linear_1": "colwise", "mlp_AR.linear_2": "rowwise"}  # noqa: RUF012
    accepts_loss_kwargs = True

    def __init__(self, config: KeyeConfig):
        if config.vision_config._attn_implementation is None:
            # transformers' default, SDPA, would keep the tower from this package's kernels
            config.vision_config._attn_implementation = NAME
        super().__init__(config)
        lean = config.lean()
        self.visual = KeyeVisionModel(config.vision_config, segment_by_frame=lean.edition == "1.5")
        self.mlp_AR = Projector(lean, impl="auto")
        self.model = KeyeTextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """Tower and projector: normalised patches [T, 3, 14, 14] of image_grid_thw [n, 3] to [T/4, hidden]."""
        if not pixel_values.is_floating_point():
            raise TypeError(f"pixel_values must be normalised, of a floating dtype, got {pixel_values.dtype}")
        return self.mlp_AR(*self.visual(pixel_values, image_grid_thw))

    def get_rope_index(
        self,
        input_ids: Tensor,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `keye_kernels.Keye.get_rope_index`: position_ids [3, B, S] and rope_deltas [B, 1]."""
        if second_per_grid_ts is not None:
            second_per_grid_ts = torch.as_tensor(second_per_grid_ts, dtype=torch.float32)
        config = self.config.lean()
        check_placeholders(config, input_ids, image_grid_thw, video_grid_thw, attention_mask)
        return rope_index(config, input_ids, image_grid_thw, video_grid_thw, second_per_grid_ts, attention_mask)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
        num_frames: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> KeyeOutput:
        """A prompt, or further tokens with the cache of what came before.

        Args:
            input_ids: [B, S], placeholders expanded; or `inputs_embeds` [B, S, hidden], with both where pictures come too.
            attention_mask: [B, all tokens so far], 0 = padding.
            position_ids: [3, B, S], or [B, S] for all three axes, in place of the computed ones.
            labels: [B, S], -100 where no loss is wanted; the loss is that of the next token.
            pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw, second_per_grid_ts: from the processor.
            num_frames: of 1.5's processor; not needed.
            logits_to_keep: logits of only the last so many tokens; 0 = all.

        Raises: ValueError where placeholders and pictures disagree, pixels or their grids are missing, or neither ids nor
            embeddings are given.
        """
        if input_ids is None and inputs_embeds is None:
            raise ValueError("forward needs input_ids or inputs_embeds, got neither")
        visual = (
            (self.config.image_token_id, pixel_values, image_grid_thw, "pixel_values", "image_grid_thw"),
            (self.config.video_token_id, pixel_values_videos, video_grid_thw, "pixel_values_videos", "video_grid_thw"),
        )
        for _, pixels, grid_thw, pixels_name, grid_name in visual:
            if pixels is not None and grid_thw is None:
                raise ValueError(f"{pixels_name} needs {grid_name}")
            # Embeddings may hold the features already; the grids are then for the positions
            if pixels is None and grid_thw is not None and inputs_embeds is None:
                raise ValueError(f"{grid_name} needs {pixels_name}")
            if pixels is not None and input_ids is None:
                raise ValueError(PICTURES_NEED_IDS)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not (self.training and self.model.gradient_checkpointing):
            past_key_values = DynamicCache()
        if position_ids is None:
            grids = image_grid_thw, video_grid_thw, second_per_grid_ts
            tokens = tokens_or_text(input_ids, inputs_embeds)
            position_ids = self.positions(tokens, attention_mask, past_key_values, *grids)
        else:
            position_ids = position_ids[None] if position_ids.ndim == 2 else position_ids[-3:]
            self.remember_positions(position_ids, past_key_values)
        if inputs_embeds is None:
            inputs_embeds = self.model.embed_tokens(input_ids)
        for token, pixels, grid_thw, *_ in visual:
            if pixels is None:
                continue
            features = self.get_image_features(pixels, grid_thw).to(inputs_embeds.device, inputs_embeds.dtype)
            place = (input_ids == token).to(inputs_embeds.device)
            inputs_embeds = inputs_embeds.masked_scatter(place[..., None], features)
        output = self.model(inputs_embeds, position_ids, attention_mask, past_key_values, **kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return KeyeOutput(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            rope_deltas=getattr(past_key_values, "rope_deltas", None),
        )


class KeyeVL1_5ForConditionalGeneration(KeyeForConditionalGeneration):
    """Keye-VL-1.5-8B."""

    config_class = KeyeVL1_5Config


MODELS = {"Keye": KeyeForConditionalGeneration, "KeyeVL1_5": KeyeVL1_5ForConditionalGeneration}
