"""The processor of both editions: conversations, images and videos to the model's inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import torch

from keye_kernels.editions import EDITIONS, EditionName, edition_of

from .arguments import (
    check_placeholders,
    list_images,
    list_prompts,
    list_videos,
    repeat_ids,
    replace_placeholders,
    seconds_per_grid,
)
from .batch import BatchFeature, check_padding, pad_sequences
from .edition_marks import check_edition, is_marked
from .packing import PackedVideo, pack_videos, packed_patches
from .patches import PatchConfig, check_pixel_dtype, to_frame_tensors
from .prompts import load_chat_template, render_chat_template
from .tokenizer import FAST_END, FAST_START, FRAME, IMAGE_PAD, VIDEO_PAD, KeyeTokenizer, SafePrompt, read_json
from .vision_info import Messages, process_vision_info, split_conversations


class KeyeProcessor:
    """Converts conversations, images and videos to the inputs of a Keye model.

    Create one with `KeyeProcessor.from_pretrained`.

    Attributes:
        edition: "preview" or "1.5".
        tokenizer: the `KeyeTokenizer`.
        chat_template: source of the Jinja chat template.
        patch_config: the `PatchConfig`, settings of the image processor.
        image_token_id: id of the image placeholder.
        video_token_id: id of the video placeholder.
    """

    def __init__(self, tokenizer: KeyeTokenizer, patch_config: PatchConfig, chat_template: str, edition: EditionName) -> None:
        """Creates a processor from its parts. Raises ValueError if the tokenizer has no image or video placeholder."""
        self.tokenizer = tokenizer
        self.patch_config = patch_config
        self.chat_template = chat_template
        self.edition = edition
        self.image_token_id = tokenizer.token_to_id(IMAGE_PAD)
        self.video_token_id = tokenizer.token_to_id(VIDEO_PAD)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, min_pixels: int | None = None, max_pixels: int | None = None) -> KeyeProcessor:
        """Loads the processor of a checkpoint. The edition is read from `config.json`.

        Args:
            path: folder of the checkpoint, with `config.json`, `preprocessor_config.json` and `tokenizer.json`, and optionally
                `tokenizer_config.json` and `chat_template.jinja` or `chat_template.json`.
            min_pixels: smallest area of a resized image in pixels. Default: that of `preprocessor_config.json`.
            max_pixels: largest area, likewise.

        Raises:
            FileNotFoundError: the folder or a required file does not exist.
            ValueError: `model_type` is not that of a Keye checkpoint, or a file cannot be read.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise FileNotFoundError(f"path {str(path)!r} is not a folder; pass the folder of a Keye checkpoint")
        model_type = read_json(folder / "config.json").get("model_type")
        try:
            edition = edition_of(model_type).name
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from error
        patch_config = PatchConfig.from_dict(read_json(folder / "preprocessor_config.json"), edition)
        overrides: dict[str, Any] = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        patch_config = replace(patch_config, **{name: value for name, value in overrides.items() if value is not None})
        return cls(KeyeTokenizer.from_pretrained(folder), patch_config, load_chat_template(folder), edition)

    def process_vision_info(self, messages: Messages, return_video_kwargs: bool = False, **options: Any) -> tuple[Any, ...]:
        """Calls `keye_kernels.process_vision_info` with the edition of this processor; arguments, results and errors are its."""
        return process_vision_info(messages, return_video_kwargs, edition=self.edition, **options)

    @overload
    def apply_chat_template(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        thinking: str | None = None,
        *,
        tokenize: Literal[True],
        return_dict: Literal[True] = True,
        **variables: Any,
    ) -> BatchFeature: ...

    @overload
    def apply_chat_template(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        thinking: str | None = None,
        *,
        tokenize: Literal[True],
        return_dict: Literal[False],
        **variables: Any,
    ) -> torch.Tensor: ...

    @overload
    def apply_chat_template(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        thinking: str | None = None,
        tokenize: Literal[False] = False,
        **variables: Any,
    ) -> str | list[str]: ...

    def apply_chat_template(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        thinking: str | None = None,
        tokenize: bool = False,
        *,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        return_dict: bool = True,
        return_tensors: str = "pt",
        processor_kwargs: Mapping[str, Any] | None = None,
        allow_special_tokens: bool = True,
        **variables: Any,
    ) -> Any:
        """Renders the prompt of a conversation, or of each conversation of a batch.

        Args:
            messages: one conversation (a list of turns) or a list of conversations; not modified.
            add_generation_prompt: end the prompt with the start of the assistant's turn.
            thinking: "think", "no_think", or None or "auto" to let the model decide.
            tokenize: also load the images and videos, and return the model's inputs.
            continue_final_message: end with the last message's text, which the model continues, without trailing white space.
            tools: JSON schemas of functions, for a template that uses `tools`.
            chat_template: source of a Jinja template. Default: that of the processor.
            return_dict: with `tokenize`, return all inputs; False returns only `input_ids`.
            return_tensors: with `tokenize`, must be "pt".
            processor_kwargs: with `tokenize`, arguments of the processor's call such as `padding_side`.
            allow_special_tokens: False for untrusted users: special tokens in `messages`, such as `<|im_end|>`, are plain text.
                The prompt marks them with U+FDD0, which the processor's call removes. Default: True, as in the official code.
            **variables: variables of the template, such as `add_vision_id`.

        Returns:
            A string, or a list of strings for a batch. With `tokenize`, the same `BatchFeature` as calling the processor.

        Raises:
            ValueError: the prompt is empty, the thinking mode is unknown, or a turn has no role or content.
            TypeError: `messages` is not a list of turns, a text is not a string, or the template does not use a variable.
        """
        rendered: list[str] = [
            render_chat_template(
                chat_template or self.chat_template,
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                thinking=thinking,
                tools=tools,
                convert_text=None if allow_special_tokens else self.tokenizer.as_plain_text,
                **variables,
            )
            for conversation in split_conversations(messages)
        ]
        prompts = rendered if allow_special_tokens else [SafePrompt(prompt) for prompt in rendered]
        if tokenize:
            if not isinstance(processor_kwargs, Mapping | None) or not all(
                isinstance(name, str) for name in processor_kwargs or ()
            ):
                raise TypeError(f"processor_kwargs must be a dictionary of arguments, got {processor_kwargs!r:.100}")
            images, videos, video_kwargs = self.process_vision_info(messages, True)
            options = {**video_kwargs, "return_tensors": return_tensors, **(processor_kwargs or {})}
            inputs = self(prompts, images=images, videos=videos, **options)
            return inputs if return_dict else inputs["input_ids"]
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
        allow_special_tokens: bool = True,
        **video_kwargs: Any,
    ) -> BatchFeature:
        """Converts prompts with images and videos to the model's inputs.

        Args:
            text: one prompt or a list of prompts. Each `<|image_pad|>` stands for one image, each `<|video_pad|>` for one video.
            images: images, in the order of their placeholders over all prompts.
            videos: videos, likewise. A video is a tensor `[T, 3, H, W]`, a uint8 array `[T, H, W, 3]`, or a list of images or
                tensors `[3, H, W]`.
            padding: True or "longest" pads to the longest prompt; False requires prompts of equal length.
            return_tensors: must be "pt".
            padding_side: "left" (for generation) or "right".
            pixel_dtype: "float32", or "uint8" for patches that are not normalized. uint8 takes a quarter of the memory, and
                `Keye` normalizes the patches with `norm` of `patch_config`.
            allow_special_tokens: False makes special tokens in `text` plain text, placeholders too. A prompt that
                `apply_chat_template` rendered with this option keeps those of the template.
            **video_kwargs: what `process_vision_info` returned. For Preview `fps`, one number or one per video. For 1.5 `height`,
                `width`, `fast_height`, `fast_width`, `frame_types` and `timestamps`, each a list with one entry per video.
                `timestamps` may leave out the videos without times, as `keye_vl_utils` does.

        Returns:
            `input_ids` and `attention_mask`, int64 `[B, S]`. With images also `pixel_values`, `[P, 3, 14, 14]` of `pixel_dtype`,
                and `image_grid_thw`, int64 `[images, 3]`. With videos also `pixel_values_videos`, `video_grid_thw`, and
                `second_per_grid_ts`, float32 `[videos]` (Preview), or `num_frames`, int64 `[videos]` (1.5).

        Raises:
            ValueError: a prompt is empty, placeholders and images or videos differ in number, or an argument is out of range.
            TypeError: an argument has another type, or belongs to the other edition.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt', got {return_tensors!r}")
        prompts = list_prompts(text)
        if not allow_special_tokens:
            prompts = [p if isinstance(p, SafePrompt) else self.tokenizer.as_plain_text(p) for p in prompts]
        edition = EDITIONS[self.edition]
        images, videos = list_images(images), list_videos(videos)
        check_edition(self.edition, images=images, videos=videos)
        unknown = sorted(set(video_kwargs) - set(edition.video_kwargs))
        if unknown:
            raise TypeError(
                f"unexpected keyword arguments {unknown}: a checkpoint of edition {self.edition!r} takes "
                f"{edition.video_kwargs}; call process_vision_info with edition={self.edition!r}"
            )
        check_padding(padding, padding_side)
        pixel_dtype = check_pixel_dtype(pixel_dtype)
        outputs = BatchFeature(input_ids=None, attention_mask=None)
        merged_patches = self.patch_config.merge_size**2
        # Number of tokens of each placeholder in the prompts
        image_tokens: list[int] = []
        video_tokens: list[int] = []

        check_placeholders("image", IMAGE_PAD, prompts, len(images))
        if images:
            outputs["pixel_values"], grids = self.patch_config.images_to_patches(images, self.edition, pixel_dtype)
            outputs["image_grid_thw"] = torch.tensor(grids)
            image_tokens = [math.prod(grid) // merged_patches for grid in grids]

        check_placeholders("video", VIDEO_PAD, prompts, len(videos))
        if videos and edition.slow_fast_frames:
            packed_videos = self._pack_slow_fast_videos(videos, video_kwargs)
            outputs["pixel_values_videos"] = packed_patches(packed_videos, self.patch_config, pixel_dtype)
            outputs["video_grid_thw"] = torch.tensor([grid for video in packed_videos for grid in video.grid_thw])
            outputs["num_frames"] = torch.tensor([len(video.tokens) for video in packed_videos])
            prompts = replace_placeholders(prompts, VIDEO_PAD, [video.prompt for video in packed_videos])
            video_tokens = [tokens for video in packed_videos for tokens in video.tokens]
        elif videos:
            outputs["pixel_values_videos"], grids = self.patch_config.videos_to_patches(videos, self.edition, pixel_dtype)
            outputs["video_grid_thw"] = torch.tensor(grids)
            outputs["second_per_grid_ts"] = seconds_per_grid(video_kwargs.get("fps"), len(videos))
            video_tokens = [math.prod(grid) // merged_patches for grid in grids]

        repeats = {self.image_token_id: iter(image_tokens), self.video_token_id: iter(video_tokens)}
        sequences = [repeat_ids(self.tokenizer.encode(prompt), repeats) for prompt in prompts]
        outputs["input_ids"], outputs["attention_mask"] = pad_sequences(
            sequences, self.tokenizer.pad_token_id, padding=padding, padding_side=padding_side
        )
        return outputs

    def decode(
        self,
        token_ids: int | Sequence[int] | torch.Tensor,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> str:
        """Converts token ids to text.

        Args:
            token_ids: one id, or `[S]` ids.
            skip_special_tokens: leave special tokens out. Tags such as `<think>` are kept.
            clean_up_tokenization_spaces: True raises ValueError; Keye's tokenizer configuration turns it off.
        """
        return self.tokenizer.decode(token_ids, skip_special_tokens, clean_up_tokenization_spaces)

    def batch_decode(
        self,
        sequences: Iterable[Sequence[int] | torch.Tensor],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> list[str]:
        """Converts `[B, S]` token ids, or a list of B sequences of ids, to B texts; other arguments as for `decode`."""
        return self.tokenizer.batch_decode(sequences, skip_special_tokens, clean_up_tokenization_spaces)

    def _pack_slow_fast_videos(self, videos: list[Any], video_kwargs: Mapping[str, Any]) -> list[PackedVideo]:
        if is_marked(videos) and not video_kwargs:
            names = EDITIONS[self.edition].video_kwargs
            raise ValueError(f"videos of process_vision_info need its keyword arguments {names}, got none")
        # Only videos need these tokens, so a tokenizer without them still works for images.
        for token in (FRAME, FAST_START, FAST_END):
            self.tokenizer.token_to_id(token)
        frames = [to_frame_tensors(video, self.edition) for video in videos]
        return pack_videos(frames, self.patch_config, video_kwargs)
