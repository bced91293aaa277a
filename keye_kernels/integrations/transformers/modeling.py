"""Keye-VL as a transformers model: tower, projector and text model under the names of the checkpoint.

The parts are in `vision` and `text`; what `generate` needs is in `generation`.
Symbols: B sequences, S tokens per sequence, T patches, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from keye_kernels.editions import edition_of
from keye_kernels.model.config import check_number
from keye_kernels.model.positions import check_placeholders, check_seconds, rope_index

from .attention import NAME, register_attention
from .config import KeyeConfig, KeyeVL1_5Config
from .generation import IMAGES_NEED_IDS, MEDIA, KeyeGenerationMixin, tokens_or_text
from .pretrained import KeyePreTrainedModel
from .text import KeyeTextModel
from .versions import lm_head_plan
from .vision import KeyeVisionModel, Projector

register_attention()


@dataclass
class KeyeOutput(CausalLMOutputWithPast):
    """The output of a causal language model, and `rope_deltas` [B, 1]: position id minus index of a token in the cache."""

    rope_deltas: Tensor | None = None


class KeyeForConditionalGeneration(KeyeGenerationMixin, KeyePreTrainedModel, GenerationMixin):
    """Keye-VL-8B-Preview."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": lm_head_plan(), "mlp_AR.linear_1": "colwise", "mlp_AR.linear_2": "rowwise"}  # noqa: RUF012
    accepts_loss_kwargs = True

    def __init__(self, config: KeyeConfig):
        if config.vision_config._attn_implementation is None:
            # Otherwise transformers would choose SDPA for the tower
            config.vision_config._attn_implementation = NAME
        super().__init__(config)
        self.visual = KeyeVisionModel(config.vision_config, edition_of(config.model_type).segment_by_frame)
        self.mlp_AR = Projector(config.lean(), impl="auto")
        self.model = KeyeTextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """Encodes patches [T, 3, 14, 14] with the grids [n, 3] to embeddings [T/4, hidden] of the placeholder tokens.

        Raises TypeError for integer pixels, and ValueError if the grids do not match the patches.
        """
        if not pixel_values.is_floating_point():
            raise TypeError(f"pixel_values must be normalized, of a floating dtype, got {pixel_values.dtype}")
        return self.mlp_AR(*self.visual(pixel_values, image_grid_thw))

    def get_rope_index(
        self,
        input_ids: Tensor,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Computes 3D position ids; same arguments and results as `keye_kernels.Keye.get_rope_index`."""
        if second_per_grid_ts is not None:
            second_per_grid_ts = torch.as_tensor(second_per_grid_ts, dtype=torch.float32)
        config = self.config.lean()
        check_placeholders(config, input_ids, image_grid_thw, video_grid_thw, attention_mask)
        check_seconds(config, video_grid_thw, second_per_grid_ts)
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
        """Processes a prompt, or further tokens with the cache of the previous ones, to logits [B, S, V].

        `attention_mask` is [B, cached and new tokens], 0 = padding. `position_ids` is [3, B, S], or [B, S] for all three axes;
        default: computed. `inputs_embeds` [B, S, hidden] is passed instead of `input_ids` [B, S], or together with them if there
        are pixels. Pixels [T, 3, 14, 14], grids [n, 3], the seconds between the frames of each video (Preview) and `num_frames`
        (1.5, not used) come from the processor. `labels` [B, S], -100 = no loss, may be `input_ids`: the loss is that of the next
        token. `logits_to_keep` is a number of last tokens, or token indices; 0 = all tokens. `kwargs` are passed to the text
        model and the loss. Raises ValueError if inputs are missing or do not match.
        """
        if not isinstance(logits_to_keep, Tensor):
            check_number("logits_to_keep", logits_to_keep, 0, 2**63)
        if input_ids is None and inputs_embeds is None:
            raise ValueError("forward needs input_ids or inputs_embeds, got neither")
        media = {"pixel_values": pixel_values, "image_grid_thw": image_grid_thw}
        media |= {"pixel_values_videos": pixel_values_videos, "video_grid_thw": video_grid_thw}
        for _, pixels, grids in MEDIA:
            if media[pixels] is not None and media[grids] is None:
                raise ValueError(f"{pixels} needs {grids}")
            # inputs_embeds may already contain the features; the grids are then needed for the positions
            if media[pixels] is None and media[grids] is not None and inputs_embeds is None:
                raise ValueError(f"{grids} needs {pixels}")
            if media[pixels] is not None and input_ids is None:
                raise ValueError(IMAGES_NEED_IDS)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not (self.training and self.model.gradient_checkpointing):
            past_key_values = DynamicCache()
        if position_ids is None:
            tokens, seconds = tokens_or_text(input_ids, inputs_embeds), second_per_grid_ts
            position_ids = self.positions(tokens, attention_mask, past_key_values, image_grid_thw, video_grid_thw, seconds)
        else:
            position_ids = position_ids[None] if position_ids.ndim == 2 else position_ids[-3:]
            self.remember_positions(position_ids, past_key_values)
        if inputs_embeds is None:
            inputs_embeds = self.model.embed_tokens(input_ids)
        for token, pixels, grids in MEDIA:
            if media[pixels] is not None:
                features = self.get_image_features(media[pixels], media[grids]).to(inputs_embeds.device, inputs_embeds.dtype)
                is_placeholder = (input_ids == getattr(self.config, token)).to(inputs_embeds.device)
                inputs_embeds = inputs_embeds.masked_scatter(is_placeholder[..., None], features)
        output = self.model(inputs_embeds, position_ids, attention_mask, past_key_values, **kwargs)
        keep = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep, None)
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


MODELS = (KeyeForConditionalGeneration, KeyeVL1_5ForConditionalGeneration)
