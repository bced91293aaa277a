"""Keye-VL from end to end: tower, projector, decoder, and generation. Symbols: B rows, S tokens of a row, V vocabulary."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keye_kernels.ops.implementation import check_impl, impl_outside_attention

from .cache import KVCache
from .checkpoint import allocate, load_weights, stored_dtype
from .config import KeyeConfig
from .decoder import Decoder
from .generation import Sampler, Streamer, end_tokens
from .linear import Linear
from .positions import check_placeholders, rope_index
from .projector import Projector
from .step_graph import decoding_step
from .vision import PixelNorm, VisionTower

CACHE_ROUNDING = 256  # a cache made by `forward` has room for at least so many more tokens


class KeyeOutput(NamedTuple):
    """logits [B, S or logits_to_keep, V]; the cache to go on with; rope_deltas [B, 1] from slot to position."""

    logits: Tensor
    cache: KVCache | None
    rope_deltas: Tensor


class Keye(nn.Module):
    """Keye-VL-8B-Preview or Keye-VL-1.5-8B, by `config.model_type`; see the specification for what each must compute."""

    def __init__(self, config: KeyeConfig, impl: str = "auto"):
        super().__init__()
        check_impl(impl)
        self.config = config
        self.generation_config: dict = {}
        self.visual = VisionTower(config.vision_config, config.edition == "1.5", impl)
        self.mlp_AR = Projector(config, impl_outside_attention(impl))
        self.model = Decoder(config, impl)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self._tie()
        if self.device.type != "meta":
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fills the parameters anew for training from nothing: normal with std `initializer_range`, norms one, biases zero."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=self.config.initializer_range)
            else:
                parameter.fill_(float("norm" in name and name.endswith("weight")))

    def _tie(self) -> None:
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
        progress: bool = False,
    ) -> "Keye":
        """Loads a checkpoint folder: config.json, safetensors (one file or sharded) and, if there, generation_config.json.

        Args:
            dtype: of the parameters; the configuration's (or else the stored one) if None.
            device: torch's default device if None.
            impl: "auto", "reference", "triton" or "flash_attn" (attention only), for every operator.
            progress: show a bar while the weights load.

        Raises: FileNotFoundError for a missing file; ValueError for an unknown model type, a device that is not there, or
            tensors that are missing, unexpected or of a wrong shape (all of them listed).
        """
        path = Path(path)
        config = KeyeConfig.from_pretrained(path)
        device = _check_device(torch.get_default_device() if device is None else device)
        with torch.device("meta"):
            model = cls(config, impl)
        allocate(model, _check_dtype(dtype or config.torch_dtype or stored_dtype(path)), device)
        model._tie()
        load_weights(model, path, progress=progress)
        model.generation_config = _read_json(path / "generation_config.json")
        pixels = _read_json(path / "preprocessor_config.json")
        known = {name: pixels[name] for name in PixelNorm._fields if pixels.get(name) is not None}
        model.visual.pixel_norm = PixelNorm(**known)
        return model.eval()

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for `batch_size` rows of at most `max_length` tokens, prompt and padding included."""
        return KVCache(self.config, batch_size, max_length, self.dtype, self.device)

    def get_rope_index(
        self,
        input_ids: Tensor,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """3D positions of a prompt.

        Args:
            input_ids: [B, S], placeholders expanded; attention_mask: [B, S], 0 = padding.
            image_grid_thw, video_grid_thw: [n, 3] integers; second_per_grid_ts: seconds between frames of each video
                (Preview only; 1.0 if absent).

        Returns: position_ids [3, B, S] (time, height, width; 1 on padding) and rope_deltas [B, 1].
        Raises: ValueError where placeholders and grids disagree, or the mask hides a placeholder.
        """
        if second_per_grid_ts is not None and not isinstance(second_per_grid_ts, Tensor):
            second_per_grid_ts = torch.tensor(second_per_grid_ts, dtype=torch.float32)
        if not torch.compiler.is_compiling():
            check_placeholders(self.config, input_ids, image_grid_thw, video_grid_thw, attention_mask)
        return rope_index(self.config, input_ids, image_grid_thw, video_grid_thw, second_per_grid_ts, attention_mask)

    def get_image_features(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """Tower and projector: patches [T, 3, 14, 14] (normalised, or uint8) of grid_thw [n, 3] to [T/4, hidden]."""
        vision = self.config.vision_config
        shape = (vision.num_channels, vision.patch_size, vision.patch_size)
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != shape:
            raise ValueError(f"pixel_values must have shape {['T', *shape]}, got {list(pixel_values.shape)}")
        batch = self.visual.geometry(grid_thw, pixel_values.shape[0])
        return self.mlp_AR(self.visual(pixel_values.to(self.device), batch), batch)

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
        """A prompt (without a cache, or with an empty one), or further tokens (with the cache of what came before).

        Args:
            input_ids: [B, S], placeholders expanded.
            attention_mask: [B, S], 0 = padding, at the left or at the right; with a cache also [B, all tokens so far].
            pixel_values, pixel_values_videos: [T, 3, 14, 14] patches of all images and of all frames, normalised or
                uint8, with image_grid_thw and video_grid_thw [n, 3].
            second_per_grid_ts: seconds between the frames of each video (Preview). num_frames: accepted for 1.5 and not used.
            position_ids: [3, B, S], computed if None.
            cache: one is made, with room for at least 256 more tokens, if None.
            logits_to_keep: logits of only the last so many tokens; 0 = all.
        """
        rows, length = input_ids.shape
        if (pixel_values is None, pixel_values_videos is None) != (image_grid_thw is None, video_grid_thw is None):
            raise ValueError(
                "pixel_values and image_grid_thw (or those of videos) must be given together, got only one"
            )
        mask = self._check_inputs(input_ids, attention_mask, cache)
        if cache is None:
            cache = self.new_cache(rows, (length // CACHE_ROUNDING + 2) * CACHE_ROUNDING)
        if cache.is_empty:
            # Also where the caller brings positions of his own: decoding goes on from the deltas
            computed, cache.rope_deltas = self.get_rope_index(
                input_ids, image_grid_thw, video_grid_thw, second_per_grid_ts, attention_mask
            )
        else:
            computed = (cache.slots(length) + cache.rope_deltas).expand(3, rows, length)
        embeds = self.model.embed_tokens(input_ids)
        for token, pixels, grid_thw in (
            (self.config.image_token_id, pixel_values, image_grid_thw),
            (self.config.video_token_id, pixel_values_videos, video_grid_thw),
        ):
            if (pixels is None) != (grid_thw is None):
                raise ValueError(
                    "pixel_values and image_grid_thw (or those of videos) must be given together, got only one"
                )
            if pixels is not None:
                features = self.get_image_features(pixels, grid_thw).to(embeds.dtype)
                embeds = embeds.masked_scatter((input_ids == token)[..., None], features)
        hidden = self.model(embeds, computed if position_ids is None else position_ids, mask, cache)
        return KeyeOutput(self.lm_head(hidden[:, -logits_to_keep:]), cache, cache.rope_deltas)

    def _check_inputs(self, input_ids: Tensor, attention_mask: Tensor | None, cache: KVCache | None) -> Tensor:
        """The mask [B, S] of these tokens. Raises ValueError for shapes, and for padding in the middle of a prompt."""
        rows, length = input_ids.shape
        if length == 0:
            raise ValueError("input_ids must hold at least one token, got an empty prompt")
        if cache is not None:
            cache.check_room(rows, length)
        if attention_mask is None:
            return torch.ones_like(input_ids)
        if attention_mask.shape[0] != rows or attention_mask.shape[1] < length:
            raise ValueError(f"attention_mask must have shape {[rows, length]}, got {list(attention_mask.shape)}")
        mask = attention_mask[:, -length:]
        starts = F.pad(mask.bool().int(), (1, 0)).diff(dim=1) > 0
        if not torch.compiler.is_compiling() and (starts.sum(1) > 1).any():
            raise ValueError(
                "attention_mask must be 0 at the ends of a row only, but a row has padding between its tokens"
            )
        return mask

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
        **vision_inputs: Tensor,
    ) -> Tensor:
        """Continues each row of `input_ids` [B, S] (padded at the left) and returns [B, S + new tokens].

        Args:
            max_new_tokens: at most so many; generation ends earlier once every row has met an end token.
            do_sample, temperature, top_k, top_p, seed: how tokens are drawn; greedy unless do_sample.
            eos_token_id: one or several end tokens; () never stops. pad_token_id: follows a row's end.
            streamer: receives the prompt, then each step's tokens [B], then the end.
            vision_inputs: pixel_values, image_grid_thw, ... as for `forward`.

        What is None comes from generation_config.json, temperature, top_k and top_p included.
        Raises: ValueError where prompt and new tokens exceed max_position_embeddings, or for padding at the right.
        """
        rows, length = input_ids.shape
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if length + max_new_tokens > self.config.max_position_embeddings:
            raise ValueError(
                f"max_new_tokens: {length} tokens of prompt and {max_new_tokens} new ones exceed the model's "
                f"{self.config.max_position_embeddings} positions; shorten the prompt or ask for fewer"
            )
        if attention_mask is not None and not attention_mask[:, -1].all():
            raise ValueError("attention_mask must pad at the left for generation, but a row ends in padding")
        defaults = self.generation_config
        sampler = Sampler(
            do_sample,
            *(
                defaults.get(name) if value is None else value
                for name, value in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p))
            ),
            seed=seed,
            device=self.device,
        )
        ends = end_tokens(eos_token_id, defaults.get("eos_token_id"))
        pad = defaults.get("pad_token_id", ends[0] if ends else 0) if pad_token_id is None else pad_token_id
        ends = torch.tensor(ends, dtype=torch.int64, device=self.device)

        cache = self.new_cache(rows, length + max_new_tokens)
        tokens = torch.full((rows, length + max_new_tokens), pad, dtype=torch.int64, device=self.device)
        tokens[:, :length] = input_ids
        finished = torch.zeros(rows, dtype=torch.bool, device=self.device)
        if streamer is not None:
            streamer.put(input_ids)
        logits = self(input_ids, attention_mask, cache=cache, logits_to_keep=1, **vision_inputs).logits
        step = decoding_step(self, cache, max_new_tokens - 1)
        for at in range(length, length + max_new_tokens):
            chosen = sampler(logits[:, -1]).masked_fill(finished, pad)
            tokens[:, at] = chosen
            if streamer is not None:
                streamer.put(chosen)
            finished |= torch.isin(chosen, ends)
            if at + 1 == tokens.shape[1] or (len(ends) and finished.all()):
                break
            logits = step(chosen[:, None])
        if streamer is not None:
            streamer.end()
        return tokens[:, : at + 1]


def _read_json(file: Path) -> dict:
    """A configuration that a checkpoint may leave out."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _check_device(device: torch.device | str) -> torch.device:
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be a torch device such as 'cpu' or 'cuda:0', got {device!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {str(device)!r} was asked for, but torch finds no CUDA or ROCm GPU here; use device='cpu'"
        )
    return device


def _check_dtype(dtype: torch.dtype | str) -> torch.dtype:
    chosen = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise TypeError(f"dtype must be a floating-point torch dtype such as 'bfloat16', got {dtype!r}")
    return chosen
