"""Keye-VL, from pixels and token ids to logits and generated tokens.

`Keye` connects the vision tower, the projector and the decoder. Read next: `vision`, `decoder`, `positions` (3D position ids),
`cache` (key/value cache), `generation` (sampling and the decoding loop) and `checkpoint` (loading weights).
Symbols: B sequences, S tokens per sequence (padding included), T patches, V vocabulary size.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from keye_kernels.editions import edition_of
from keye_kernels.host_copy import copy_to_device
from keye_kernels.ops.checks import INTEGERS, check_tensor
from keye_kernels.ops.implementation import check_impl, impl_for
from keye_kernels.pixel_norm import PixelNorm

from . import checks, fused
from .cache import KeyeOutput, KVCache, slots_for
from .checkpoint import STORED_DTYPES, allocate, load_weights, matching_tensors
from .config import KeyeConfig, check_number, read_json
from .decoder import Decoder
from .generation import Sampler, Streamer, check_streamer, end_token_ids, first_given, generate_tokens, read_generation_config
from .linear import Linear
from .positions import check_placeholders, check_position_range, check_seconds, rope_index
from .prompt_lookup import check_prompt_lookup
from .vision import Projector, VisionTower


class Keye(nn.Module):
    """Keye-VL-8B-Preview or Keye-VL-1.5-8B, chosen by `config.model_type`.

    `Keye(config)` has random weights; `impl` and `cuda_graphs` as in `from_pretrained`. The arithmetic is documented in
    `docs/models/keye_vl_preview.md` and `docs/models/keye_vl_1_5.md`. Submodules and parameters have the names of the official
    checkpoints, apart from fused projections.
    """

    def __init__(self, config: KeyeConfig, impl: str = "auto", cuda_graphs: bool = True):
        super().__init__()
        check_impl(impl)
        if not isinstance(cuda_graphs, bool):
            raise TypeError(f"cuda_graphs must be True or False, got {cuda_graphs!r:.100}")
        self.config, self.impl, self.cuda_graphs = config, impl, cuda_graphs
        self.generation_config: dict = {}
        self.visual = VisionTower(config.vision_config, edition_of(config.model_type).segment_by_frame, impl)
        self.mlp_AR = Projector(config, impl_for("patch_merge_projection", impl))
        self.model = Decoder(config, impl)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self._tie_embeddings()
        if self.device.type != "meta":
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initializes all parameters: matrices are normal (std `config.initializer_range`), norm weights one, biases zero."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=self.config.initializer_range)
            else:
                parameter.fill_(float("norm" in name and name.endswith("weight")))

    def _tie_embeddings(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        impl: str = "auto",
        cuda_graphs: bool = True,
        progress: bool = False,
        torch_dtype: torch.dtype | str | None = None,
        device_map: torch.device | str | int | None = None,
    ) -> "Keye":
        """Loads a checkpoint.

        Args:
            path: folder with config.json and safetensors. generation_config.json and preprocessor_config.json are optional.
            dtype: dtype of the parameters. Default, also "auto": the one in config.json, else that of the stored weights.
            device: device of the parameters. Default: torch's default device.
            impl: "auto", "reference", "triton", "torch" or "flash_attn". Operators without this implementation use "auto".
            cuda_graphs: on a GPU, capture CUDA graphs of what is short: small batches of images, short prompts
                and decoding steps. The results
                are the same, within rounding. Also an attribute of the model, which may be changed at any time.
            progress: show a progress bar.
            torch_dtype: same as `dtype`, as in the official scripts.
            device_map: same as `device`, as in the official scripts; "auto" is a GPU if there is one. Must be one device.

        Returns:
            The model in eval mode.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a JSON file is invalid, the device is not available, or tensors do not match config.json.
        """
        path = Path(path)
        config = KeyeConfig.from_pretrained(path)
        device = checks.choose_device(device, device_map)
        with torch.device("meta"):
            model = cls(config, impl, cuda_graphs)
        model.generation_config = read_generation_config(path / "generation_config.json", config.vocab_size)
        model.visual.pixel_norm = PixelNorm.from_dict(read_json(path / "preprocessor_config.json"))
        # Before memory is allocated: sizes in config.json may be far from those of the tensors
        stored = matching_tensors(model, path)
        stored_dtype = STORED_DTYPES[stored["model.embed_tokens.weight"].dtype]
        dtype = checks.choose_dtype(dtype, torch_dtype, config.torch_dtype or stored_dtype)
        allocate(model, dtype, device)
        model._tie_embeddings()
        load_weights(model, stored, progress=progress)
        return model.eval()

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return self.lm_head.weight.dtype

    def new_cache(self, batch_size: int, max_length: int | None = None) -> KVCache:
        """Allocates an empty cache for `batch_size` sequences of at most `max_length` tokens, padding included.

        Without `max_length` it starts small and grows: when it is full, it is copied to one of twice the size, layer by layer.
        """
        return self._new_cache(batch_size, slots_for(0) if max_length is None else max_length, max_length is None)

    def _new_cache(self, batch_size: int, slots: int, grows: bool = True) -> KVCache:
        return KVCache(self.config, batch_size, slots, self.dtype, self.device, grows=grows)

    def get_rope_index(
        self,
        input_ids: Tensor,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Computes the 3D position ids of a prompt, from 0. The arguments are those of `forward`.

        See "3D position ids" in `docs/models/keye_vl_preview.md` and `docs/models/keye_vl_1_5.md`.

        Returns:
            position_ids [3, B, S] (time, height, width; 1 on padding) and rope_deltas [B, 1].

        Raises:
            ValueError: the placeholders do not match the grids, the mask hides a placeholder, or second_per_grid_ts is invalid.
        """
        checks.check_prompt(input_ids, attention_mask)
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask must have shape {list(input_ids.shape)}, got {list(attention_mask.shape)}")
        second_per_grid_ts = checks.to_seconds(second_per_grid_ts)
        if not torch.compiler.is_compiling():
            checks.check_token_range(input_ids, self.config.vocab_size)
            check_placeholders(self.config, input_ids, image_grid_thw, video_grid_thw, attention_mask)
            check_seconds(self.config, video_grid_thw, second_per_grid_ts)
        return rope_index(self.config, input_ids, image_grid_thw, video_grid_thw, second_per_grid_ts, attention_mask)

    def get_image_features(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """Runs the vision tower and the projector.

        Args:
            pixel_values: [T, 3, 14, 14] patches, normalized floats or uint8.
            grid_thw: [n, 3] integers: frames, patch rows and patch columns of each image or video.

        Returns:
            [T/4, hidden]: one embedding per 2x2 block of patches.

        Raises:
            TypeError: the patches are integers other than uint8.
            ValueError: the shapes are wrong or do not match.
        """
        checks.check_patches(pixel_values, self.config.vision_config.patch_shape)
        pixel_values = copy_to_device(pixel_values, self.device)
        if self.cuda_graphs and not torch.compiler.is_compiling():
            features = self.visual.graphs.encode(self, pixel_values, grid_thw)
            if features is not None:
                return features
        batch = self.visual.geometry(grid_thw, pixel_values.shape[0])
        return self.mlp_AR(self.visual(pixel_values, batch), batch)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
        num_frames: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
    ) -> KeyeOutput:
        """Runs a prompt, or the tokens after those in `cache`: a decoding step, a chunk of a prompt or a turn with new images.

        Args:
            input_ids: [B, S], with placeholders expanded to one token per merged patch.
            attention_mask: [B, S], 0 = padding, on the left or on the right. With a cache also [B, all tokens so far].
            pixel_values: [T, 3, 14, 14] patches of all images, normalized floats or uint8.
            image_grid_thw: [n, 3] integers: frames, patch rows and patch columns of each image.
            pixel_values_videos: [T, 3, 14, 14] patches of all video frames.
            video_grid_thw: [n, 3] integers, likewise for each video (1.5: for each run of frames of one size).
            second_per_grid_ts: [n] seconds between the frames of each video. Preview only. Default: 1.0.
            num_frames: accepted because the 1.5 processor returns it; not used.
            position_ids: [3, B, S]. Default: computed by `get_rope_index`, or from the cache.
            cache: Default: a new cache that grows, with room for at least 256 more tokens.
            logits_to_keep: compute logits of only this many last tokens; 0 = all.

        Raises:
            TypeError: `input_ids` are not int64 or int32.
            ValueError: shapes, placeholders, grids or padding do not match, the cache is full, positions exceed 2**23, or ids are
                not in the vocabulary (not checked in decoding steps on a GPU).
        """
        check_number("logits_to_keep", logits_to_keep, 0, 2**63)
        mask = checks.check_tokens(input_ids, attention_mask)
        batch_size, length = input_ids.shape
        checks.check_given_together("pixel_values", pixel_values, "image_grid_thw", image_grid_thw)
        checks.check_given_together("pixel_values_videos", pixel_values_videos, "video_grid_thw", video_grid_thw)
        if cache is None:
            cache = self._new_cache(batch_size, slots_for(length))
        checks.check_cache(cache)
        cache.reserve(batch_size, length)
        if position_ids is not None:
            check_tensor("position_ids", position_ids, (3, batch_size, length), INTEGERS, input_ids)
        has_grids = image_grid_thw is not None or video_grid_thw is not None
        if length == 1 and not cache.is_empty and not has_grids:
            # A decoding step reads no values of tensors, so that it does not wait for the GPU
            if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
                checks.check_token_range(input_ids, self.config.vocab_size)
            computed, deltas = (cache.slots(1) + cache.rope_deltas).expand(3, batch_size, 1), cache.rope_deltas
        else:
            # Needed even if the caller passes position_ids: decoding uses the deltas
            mask_given = None if attention_mask is None else mask
            computed, deltas = self.get_rope_index(input_ids, image_grid_thw, video_grid_thw, second_per_grid_ts, mask_given)
            if not cache.is_empty:
                # The official delta of padded text is too large for sequences of less than two tokens
                deltas = cache.rope_deltas + (deltas if has_grids else mask.sum(1, keepdim=True) - length)
                computed = computed + cache.length + cache.rope_deltas
            if not torch.compiler.is_compiling():
                check_position_range(computed if position_ids is None else position_ids, cache.max_length)
        embeds = self.model.embed_tokens(input_ids)
        for token, pixels, grid_thw in (
            (self.config.image_token_id, pixel_values, image_grid_thw),
            (self.config.video_token_id, pixel_values_videos, video_grid_thw),
        ):
            if pixels is not None and grid_thw is not None:
                features = self.get_image_features(pixels, grid_thw).to(embeds.dtype)
                embeds = embeds.masked_scatter((input_ids == token)[..., None], features)
        inputs = embeds, computed if position_ids is None else position_ids, mask, cache
        hidden = None
        if self.cuda_graphs and cache.is_empty and not torch.compiler.is_compiling():
            hidden = self.model.graphs.prefill(self.model, *inputs)
        if hidden is None:
            hidden = self.model(*inputs)
        cache.rope_deltas = deltas
        logits = fused.linear(hidden[:, -logits_to_keep:], self.lm_head, self.impl)
        return KeyeOutput(logits, cache, cache.rope_deltas)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 128,
        do_sample: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Iterable[int] | None = None,
        pad_token_id: int | None = None,
        seed: int | None = None,
        streamer: Streamer | None = None,
        prompt_lookup: int | None = None,
        cache: KVCache | None = None,
        **vision_inputs: Tensor,
    ) -> Tensor:
        """Generates tokens after each prompt. Arguments that are None are read from generation_config.json, if it has them.

        Args:
            input_ids: [B, S] as in `forward`, padded on the left.
            attention_mask: [B, S], 0 = padding.
            max_new_tokens: upper limit; generation also stops when every sequence has produced an end token.
            do_sample: sample; otherwise greedy, without temperature, top_k, top_p and seed. Not read from generation_config.json.
            temperature: divides the logits; must be positive.
            top_k: keep the k most likely tokens; 0 keeps all.
            top_p: keep the most likely tokens that together reach this probability.
            eos_token_id: one or several end tokens; () disables stopping. config.json may also have a default.
            pad_token_id: fills a sequence after its end token. Default: also from config.json, else the first end token, else 0.
            seed: makes sampling reproducible.
            streamer: receives the prompt, then the tokens [B] of each step on the CPU, then a call of `end()`.
            prompt_lookup: up to this many tokens (1 to 15), copied from what followed the same tokens earlier in the prompt or in
                the answer, are verified in each step. Greedy decoding of one sequence only; its tokens do not change.
            cache: holds a conversation between calls, each of which gets all of its tokens so far: those that the cache holds are
                not processed again, and the tokens are those without a cache. `new_cache(B)` begins a conversation.
            vision_inputs: pixel_values, image_grid_thw and the other vision arguments of `forward`. With a cache of all images or
                videos, or of those alone that the cache does not hold.

        Returns:
            [B, S + number of new tokens]: the prompts and the generated tokens.

        Raises:
            ValueError: too many tokens for max_position_embeddings, padding on the right, a bad sampling argument or
                prompt_lookup, or a cache of another batch size, dtype, device or model.
            RuntimeError: logits were NaN or infinite. Checked after the last token.
        """
        checks.check_generation(input_ids, attention_mask, max_new_tokens, self.config.max_position_embeddings)
        defaults = self.generation_config
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        sampler = Sampler.from_arguments(do_sample, sampling, defaults, self.device)
        given = first_given(eos_token_id, defaults.get("eos_token_id"), self.config.eos_token_id)
        ends = end_token_ids(given, self.config.vocab_size)
        check_streamer(streamer)
        check_prompt_lookup(prompt_lookup, len(input_ids), do_sample)
        if cache is not None:
            checks.check_cache(cache)
        pad_token_id = first_given(pad_token_id, defaults.get("pad_token_id"), self.config.pad_token_id, *ends[:1], 0)
        check_number("pad_token_id", pad_token_id, 0, self.config.vocab_size - 1)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **vision_inputs}
        return generate_tokens(self, inputs, max_new_tokens, sampler, ends, pad_token_id, streamer, prompt_lookup, cache)
