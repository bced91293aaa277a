"""One processor for both editions: conversations, pictures and videos to the model's inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .arguments import (
    align_timestamps,
    check_count,
    expand,
    frame_size,
    list_images,
    list_prompts,
    list_videos,
    per_video,
    repeat_ids,
    seconds_per_grid,
)
from .batch import BatchFeature
from .images import Edition
from .packing import PackedVideo, pack_video
from .patches import PatchConfig, to_frame_array, to_frame_tensors
from .prompts import load_chat_template, render_chat_template
from .tokenizer import FAST_END, FAST_START, FRAME, IMAGE_PAD, VIDEO_PAD, KeyeTokenizer, read_json
from .vision_info import Messages, process_vision_info, split_conversations

EDITIONS: dict[str, Edition] = {"Keye": "preview", "KeyeVL1_5": "1.5"}
VIDEO_KWARGS = {
    "preview": ("fps",),
    "1.5": ("height", "width", "fast_height", "fast_width", "timestamps", "frame_types"),
}


class KeyeProcessor:
    """Tokenizer, chat template and image processor of a Keye checkpoint.

    Attributes:
        edition: "preview" or "1.5", for :func:`process_vision_info`.
        tokenizer: :class:`KeyeTokenizer`.
        chat_template: the Jinja source.
        patch_config: :class:`PatchConfig`.
        image_token_id, video_token_id: ids of the placeholders.
    """

    def __init__(
        self, tokenizer: KeyeTokenizer, patch_config: PatchConfig, chat_template: str, edition: Edition
    ) -> None:
        self.tokenizer = tokenizer
        self.patch_config = patch_config
        self.chat_template = chat_template
        self.edition = edition
        self.image_token_id = tokenizer.token_to_id(IMAGE_PAD)
        self.video_token_id = tokenizer.token_to_id(VIDEO_PAD)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> KeyeProcessor:
        """Reads a checkpoint's folder.

        Args:
            path: has ``config.json``, ``preprocessor_config.json``, ``tokenizer.json`` and, where present,
                ``tokenizer_config.json`` and ``chat_template.jinja`` or ``.json``.
            min_pixels, max_pixels: limits of a picture's area in place of the configured ones.

        Raises:
            FileNotFoundError: the folder or a file in it does not exist.
            ValueError: an unknown ``model_type``, or a file that cannot be read.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise FileNotFoundError(f"path {str(path)!r} is not a folder; pass the folder of a Keye checkpoint")
        model_type = read_json(folder / "config.json").get("model_type")
        if model_type not in EDITIONS:
            raise ValueError(
                f"model_type in {folder / 'config.json'} must be one of {list(EDITIONS)}, got {model_type!r}"
            )
        edition = EDITIONS[model_type]
        patch_config = PatchConfig.from_dict(read_json(folder / "preprocessor_config.json"), edition)
        overrides = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        patch_config = replace(patch_config, **{name: value for name, value in overrides.items() if value is not None})
        return cls(KeyeTokenizer.from_pretrained(folder), patch_config, load_chat_template(folder), edition)

    def apply_chat_template(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        thinking: str | None = None,
        tokenize: bool = False,
        **variables: Any,
    ) -> str | list[str] | BatchFeature:
        """The prompt of a conversation, or of each conversation in a batch.

        Args:
            messages: one conversation (a list of turns) or a list of them; never modified.
            add_generation_prompt: end with the opening of the assistant's turn.
            thinking: None or "auto" (the model decides), "think" or "no_think".
            tokenize: load the pictures and videos as well and return the model's inputs.
            variables: further names the template may read, such as ``add_vision_id``.

        Returns:
            A string, or a list of strings for a batch; with ``tokenize`` a :class:`BatchFeature`.

        Raises:
            ValueError, TypeError: messages that are no conversation, an empty prompt or an unknown mode.
        """
        prompts = [
            render_chat_template(
                self.chat_template,
                conversation,
                add_generation_prompt=add_generation_prompt,
                thinking=thinking,
                **variables,
            )
            for conversation in split_conversations(messages)
        ]
        if tokenize:
            images, videos, video_kwargs = process_vision_info(messages, True, edition=self.edition)
            return self(prompts, images=images, videos=videos, **video_kwargs)
        return prompts[0] if isinstance(messages[0], Mapping) else prompts

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        images: Any = None,
        videos: Any = None,
        padding: bool | str = True,
        return_tensors: str = "pt",
        padding_side: str = "left",
        pixel_dtype: str = "float32",
        **video_kwargs: Any,
    ) -> BatchFeature:
        """The model's inputs for prompts with pictures and videos.

        Args:
            text: one prompt or several; each ``<|image_pad|>`` and ``<|video_pad|>`` stands for one picture or video.
            images: pictures in the order of their placeholders over all prompts.
            videos: videos likewise: tensors ``[T, 3, H, W]``, uint8 arrays ``[T, H, W, 3]``, or lists of pictures or
                tensors ``[3, H, W]``.
            padding: True or "longest" pads shorter prompts; False needs prompts of equal length.
            return_tensors: "pt".
            padding_side: "left" for generation, or "right".
            pixel_dtype: "float32", or "uint8" for patches not normalised yet, of a quarter of the size; the model
                then applies ``rescale_factor``, ``image_mean`` and ``image_std`` of :attr:`patch_config`.
            video_kwargs: what :func:`process_vision_info` returned. Preview: ``fps``, a number or one for each video.
                1.5: ``height``, ``width``, ``fast_height``, ``fast_width``, ``frame_types`` and ``timestamps``, each a
                list over videos. Where keye-vl-utils left out the ``timestamps`` of some videos, they are matched by
                their lengths.

        Returns:
            ``input_ids`` and ``attention_mask`` int64 ``[B, S]``; with pictures ``pixel_values`` of ``pixel_dtype``
            ``[P, 3, 14, 14]`` and ``image_grid_thw`` int64 ``[images, 3]``; with videos ``pixel_values_videos`` and
            ``video_grid_thw``, and ``second_per_grid_ts`` float32 ``[videos]`` (Preview) or ``num_frames`` int64
            ``[videos]`` (1.5).

        Raises:
            ValueError: an empty prompt, other numbers of placeholders than of pictures or videos, or an argument out
                of range.
            TypeError: an argument of another type, or a keyword of the other edition.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt', got {return_tensors!r}")
        prompts = list_prompts(text)
        unknown = sorted(set(video_kwargs) - set(VIDEO_KWARGS[self.edition]))
        if unknown:
            raise TypeError(
                f"unexpected keyword arguments {unknown}: a checkpoint of edition {self.edition!r} takes "
                f"{VIDEO_KWARGS[self.edition]}; call process_vision_info with edition={self.edition!r}"
            )
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
        finish = self._pixel_finish(pixel_dtype)
        outputs = BatchFeature(input_ids=None, attention_mask=None)
        merged = self.patch_config.merge_size**2
        # Tokens that each placeholder left in the prompts stands for.
        image_tokens: list[int] = []
        video_tokens: list[int] = []

        images = list_images(images)
        check_count("image", IMAGE_PAD, prompts, len(images))
        if images:
            packed = [self.patch_config.frames_to_patches([to_frame_array(image, self.edition)]) for image in images]
            outputs["pixel_values"] = finish([patches for patches, _ in packed])
            outputs["image_grid_thw"] = torch.tensor([grid for _, grid in packed])
            image_tokens = [math.prod(grid) // merged for _, grid in packed]

        videos = list_videos(videos)
        check_count("video", VIDEO_PAD, prompts, len(videos))
        if videos and self.edition == "preview":
            packed = [self._preview_video(video) for video in videos]
            outputs["pixel_values_videos"] = finish([patches for patches, _ in packed])
            outputs["video_grid_thw"] = torch.tensor([grid for _, grid in packed])
            outputs["second_per_grid_ts"] = seconds_per_grid(video_kwargs.get("fps"), len(videos))
            video_tokens = [math.prod(grid) // merged for _, grid in packed]
        elif videos:
            packed = self._slow_fast_videos(videos, video_kwargs)
            outputs["pixel_values_videos"] = finish([video.patches for video in packed])
            outputs["video_grid_thw"] = torch.tensor([row for video in packed for row in video.grid_thw])
            outputs["num_frames"] = torch.tensor([len(video.tokens) for video in packed])
            prompts = expand(prompts, VIDEO_PAD, [video.prompt for video in packed])
            video_tokens = [tokens for video in packed for tokens in video.tokens]

        repeats = {self.image_token_id: iter(image_tokens), self.video_token_id: iter(video_tokens)}
        rows = [repeat_ids(self.tokenizer.encode(prompt), repeats) for prompt in prompts]
        outputs["input_ids"], outputs["attention_mask"] = self._pad(rows, padding, padding_side)
        return outputs

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """As :meth:`KeyeTokenizer.decode`."""
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """As :meth:`KeyeTokenizer.batch_decode`."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def _preview_video(self, video: Any) -> tuple[torch.Tensor, tuple[int, int, int]]:
        frames = to_frame_tensors(video, self.edition)
        return self.patch_config.frames_to_patches([frame.permute(1, 2, 0).contiguous().numpy() for frame in frames])

    def _slow_fast_videos(self, videos: list[Any], video_kwargs: Mapping[str, Any]) -> list[PackedVideo]:
        frames = [to_frame_tensors(video, self.edition) for video in videos]
        timestamps = align_timestamps(video_kwargs.get("timestamps"), [len(video) for video in frames])
        columns = {
            name: per_video(name, value, len(videos), nested=name in ("timestamps", "frame_types"))
            for name in VIDEO_KWARGS["1.5"]
            for value in [timestamps if name == "timestamps" else video_kwargs.get(name)]
        }
        packed = []
        for index, video in enumerate(frames):
            options = {name: column[index] for name, column in columns.items()}
            packed.append(
                pack_video(
                    video,
                    self.patch_config,
                    slow_size=frame_size("height", "width", options),
                    fast_size=frame_size("fast_height", "fast_width", options),
                    frame_types=options["frame_types"],
                    timestamps=options["timestamps"],
                )
            )
        # Only videos need these tokens, so older tokenizers stay usable for pictures.
        for token in (FRAME, FAST_START, FAST_END):
            self.tokenizer.token_to_id(token)
        return packed

    def _pixel_finish(self, pixel_dtype: str) -> Callable[[list[torch.Tensor]], torch.Tensor]:
        name = str(pixel_dtype).removeprefix("torch.")
        if name not in ("float32", "uint8"):
            raise ValueError(f"pixel_dtype must be 'float32' or 'uint8', got {pixel_dtype!r}")
        if name == "uint8":
            return torch.cat
        return lambda patches: self.patch_config.normalize(torch.cat(patches))

    def _pad(self, rows: list[list[int]], padding: bool | str, side: str) -> tuple[torch.Tensor, torch.Tensor]:
        if padding not in (True, False, "longest"):
            raise ValueError(f"padding must be True, 'longest' or False, got {padding!r}")
        lengths = [len(row) for row in rows]
        if len(set(lengths)) > 1:
            if not padding:
                raise ValueError(f"padding=False needs prompts of equal length, got {lengths} tokens; use padding=True")
            if self.tokenizer.pad_token_id is None:
                raise ValueError("a batch of unequal prompts needs pad_token or eos_token in tokenizer_config.json")
        input_ids = torch.full((len(rows), max(lengths)), self.tokenizer.pad_token_id or 0, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for index, row in enumerate(rows):
            place = slice(-len(row), None) if side == "left" else slice(len(row))
            input_ids[index, place] = torch.tensor(row)
            attention_mask[index, place] = 1
        return input_ids, attention_mask
