"""What `generate` needs to know about Keye: 3D position ids, which depend on the cache, and the images of each sequence."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from keye_kernels.model.positions import check_seconds

# Placeholder token, pixels and grids of each kind of input
MEDIA = (("image_token_id", "pixel_values", "image_grid_thw"), ("video_token_id", "pixel_values_videos", "video_grid_thw"))
VISION_INPUTS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts", "num_frames")

IMAGES_NEED_IDS = "images and videos need input_ids, which contain their placeholders"


def tokens_or_text(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """`input_ids` [B, S], or ids that are no placeholders if there are only embeddings."""
    return inputs_embeds.new_full(inputs_embeds.shape[:2], -1, dtype=torch.int64) if input_ids is None else input_ids


class KeyeGenerationMixin:
    """For a class that has `config`, `get_rope_index` and transformers' `GenerationMixin`."""

    def positions(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None,
        image_grid_thw: Tensor | None,
        video_grid_thw: Tensor | None,
        second_per_grid_ts: Tensor | None,
    ) -> Tensor:
        """Computes position ids [3, B, S] of `tokens` [B, S], which follow the tokens in the cache.

        The offsets [B, 1] from token index to position id are kept in the cache and not in the model, so that several
        conversations can use one model.
        """
        past = 0 if cache is None else cache.get_seq_length()
        if past and image_grid_thw is None and video_grid_thw is None:
            index = torch.arange(past, past + tokens.shape[1], device=tokens.device)
            return (index + cache.rope_deltas.to(tokens.device)).expand(3, -1, -1)
        if attention_mask is not None and attention_mask.ndim != 2:
            shape = list(attention_mask.shape)
            raise ValueError(f"attention_mask must have shape [B, tokens] unless position_ids are given, got {shape}")
        mask = None if attention_mask is None else attention_mask[:, -tokens.shape[1] :]
        position, delta = self.get_rope_index(tokens, image_grid_thw, video_grid_thw, second_per_grid_ts, mask)
        if past:
            # A later turn of the conversation, with new images
            before = cache.rope_deltas.to(delta.device)
            position, delta = position + past + before, delta + before
        if cache is not None:
            cache.rope_deltas = delta
        return position

    def remember_positions(self, position_ids: Tensor, cache: Cache | None) -> None:
        """Computes the offsets of a new cache from the caller's own `position_ids` [1 or 3, B, S]."""
        if cache is not None and not hasattr(cache, "rope_deltas"):
            end = cache.get_seq_length() + position_ids.shape[-1]
            cache.rope_deltas = position_ids.amax((0, 2))[:, None] + 1 - end

    def _prepare_position_ids_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """None: `prepare_inputs_for_generation` computes them in each step."""

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        position_ids: Tensor | None = None,
        attention_mask: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        # transformers looks for these argument names in the signature
        given = {"position_ids": position_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **given, **kwargs)
        embeds = inputs.get("inputs_embeds")
        if embeds is not None and any(kwargs.get(pixels) is not None for _, pixels, _ in MEDIA):
            # transformers drops the ids if there are embeddings, but the placeholders are in the ids
            if input_ids.shape != embeds.shape[:2]:
                raise ValueError(IMAGES_NEED_IDS)
            inputs["input_ids"] = input_ids
        cache = inputs.get("past_key_values")
        tokens = tokens_or_text(inputs.get("input_ids"), embeds)
        if cache is not None and cache.get_seq_length() and not self._is_new_prompt(tokens, kwargs):
            inputs = {name: value for name, value in inputs.items() if name not in VISION_INPUTS}
        if position_ids is None:
            grids = (inputs.get(name) for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts"))
            inputs["position_ids"] = self.positions(tokens, attention_mask, cache, *grids)
        return inputs

    def _is_new_prompt(self, tokens: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether the images among the inputs belong to `tokens`, and not to tokens that are already in the cache."""
        if "cache_position" not in kwargs:
            return bool(kwargs.get("is_first_iteration"))
        # transformers 4 does not pass is_first_iteration. Compares counts, because a placeholder may have been generated
        merged = self.config.vision_config.spatial_merge_size**2
        given = [(token, kwargs[grids]) for token, _, grids in MEDIA if kwargs.get(grids) is not None]
        return all((tokens == getattr(self.config, token)).sum() * merged == g.prod(1).sum() for token, g in given)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeats each sequence `expand_size` times (beams, samples), together with its images."""
        repeated = {}
        if expand_size > 1 and input_ids is not None:
            for token, pixels, grids in MEDIA:
                if kwargs.get(grids) is not None:
                    placeholders = (input_ids == getattr(self.config, token)).sum(1)
                    repeated |= self._repeat_media(placeholders, kwargs, pixels, grids, expand_size)
        rest = {name: value for name, value in kwargs.items() if name not in repeated}
        input_ids, rest = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **rest)
        return input_ids, {**rest, **repeated}

    def _repeat_media(self, placeholders: Tensor, kwargs: dict[str, Any], pixels: str, grids: str, times: int) -> dict[str, Any]:
        """Pixels, grids and second_per_grid_ts of each sequence, `times` times. `placeholders` [B]: number per sequence."""
        merged = self.config.vision_config.spatial_merge_size**2
        patches = kwargs[grids].prod(1)
        ends = placeholders.cumsum(0) * merged
        sequence = torch.searchsorted(ends, patches.cumsum(0))
        order = [index for b in range(len(placeholders)) for index in times * torch.where(sequence == b)[0].tolist()]
        pieces = kwargs[pixels].split(patches.tolist())
        repeated = {pixels: torch.cat([pieces[index] for index in order]), grids: kwargs[grids][order]}
        seconds = kwargs.get("second_per_grid_ts")
        if grids == "video_grid_thw" and seconds is not None:
            seconds = torch.as_tensor(seconds, dtype=torch.float32).flatten()
            # Before they are repeated: one number for each beam of one video would look valid
            check_seconds(self.config.lean(), kwargs[grids], seconds)
            repeated["second_per_grid_ts"] = seconds.expand(len(patches))[order]
        return repeated
