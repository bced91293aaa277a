"""Processors in transformers' form: `tokenizer`, `image_processor`, and `keye_kernels.KeyeProcessor` doing the work."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoTokenizer, BatchFeature, PretrainedConfig
from transformers.processing_utils import ProcessorMixin

from keye_kernels.editions import EDITIONS
from keye_kernels.processing import KeyeProcessor as LeanProcessor
from keye_kernels.processing import process_vision_info
from keye_kernels.processing.prompts import DEFAULT_CHAT_TEMPLATE
from keye_kernels.processing.tokenizer import FAST_END, FAST_START, FRAME, IMAGE_PAD, VIDEO_PAD, KeyeTokenizer
from keye_kernels.processing.vision_info import split_conversations

from .image_processing import SETTINGS, KeyeVL1_5ImageProcessor, SiglipImageProcessor

# Of the arguments that transformers hands to every processor, those that the lean one takes
CALL_ARGUMENTS = ("padding", "padding_side", "return_tensors")
# Those that change nothing here
IGNORED_ARGUMENTS = (
    *("add_special_tokens", "truncation", "max_length"),
    *("return_attention_mask", "return_token_type_ids", "return_mm_token_type_ids"),
)
# Arguments by kind, as transformers groups them; here all are of one kind
GROUPS = ("common_kwargs", "text_kwargs", "images_kwargs", "videos_kwargs")
# Names that transformers' conversations use for the place of a picture or video
SOURCES = ("url", "path", "base64")
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
PARTS = ("tokenizer", "image_processor", "chat_template", "padding_side")
# What the Auto classes and their callers pass besides
IGNORED_BY_LOADING = (
    *("use_fast", "backend", "trust_remote_code", "code_revision", "proxies", "resume_download", "use_auth_token"),
    *("config", "user_agent", "repo_type", "_from_auto", "_from_pipeline", "_commit_hash"),
)


class KeyeProcessor(ProcessorMixin):
    """Preview's. `processor(text=..., images=..., videos=..., **video_kwargs)` as in the official scripts.

    Attributes: image_processor, tokenizer, chat_template, edition ("preview" or "1.5", for
    `keye_kernels.process_vision_info`), image_token, video_token and their ids.
    """

    attributes = ["image_processor", "tokenizer"]  # noqa: RUF012 - transformers reads class attributes
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"
    edition = SiglipImageProcessor.edition
    image_processor_type = SiglipImageProcessor
    image_token, video_token = IMAGE_PAD, VIDEO_PAD

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None):
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise TypeError(f"tokenizer must be a fast one (with a tokenizer.json), got {type(tokenizer).__name__}")
        if getattr(image_processor, "edition", None) != self.edition:
            raise TypeError(
                f"image_processor must be a {self.image_processor_type.__name__} of keye_kernels, "
                f"got {type(image_processor).__name__}"
            )
        super().__init__(image_processor, tokenizer, chat_template=chat_template or DEFAULT_CHAT_TEMPLATE)
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_PAD)
        self.video_token_id = tokenizer.convert_tokens_to_ids(VIDEO_PAD)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "KeyeProcessor":
        """Reads a folder or a repository; its configuration, where there is one, decides on the edition.

        Args: `min_pixels`, `max_pixels` and other settings of the image processor; `tokenizer` and `image_processor`
            that are loaded already; `padding_side`, "left" unless given (a `tokenizer` of the caller's keeps its own);
            transformers' own `cache_dir`, `token`, `revision` and so on.

        Raises: TypeError for an argument of another name.
        """
        known = (*SETTINGS, *PARTS, *HUB_ARGUMENTS)
        # vLLM hands a request's arguments over as well
        of_calls = (
            *CALL_ARGUMENTS,
            *IGNORED_ARGUMENTS,
            *GROUPS,
            *EDITIONS["preview"].video_kwargs,
            *EDITIONS["1.5"].video_kwargs,
        )
        unknown = [name for name in kwargs if name not in (*known, *IGNORED_BY_LOADING, *of_calls)]
        # A pipeline hands the model's arguments to the processor as well
        if unknown and "_from_pipeline" not in kwargs:
            raise TypeError(
                f"unexpected keyword arguments {unknown}: from_pretrained of this processor takes {list(known)}"
            )
        path = pretrained_model_name_or_path
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        cls = PROCESSORS.get(PretrainedConfig.get_config_dict(path, **hub)[0].get("model_type"), cls)
        settings = {name: kwargs[name] for name in SETTINGS if name in kwargs}
        image_processor = kwargs.get("image_processor")
        if image_processor is None:
            image_processor = cls.image_processor_type.from_pretrained(path, **hub, **settings)
        tokenizer = kwargs.get("tokenizer")
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **hub)
            # Files often do not say, and answers cannot be generated behind padding
            tokenizer.padding_side = "left"
        if kwargs.get("padding_side") is not None:
            tokenizer.padding_side = kwargs["padding_side"]
        chat_template = kwargs.get("chat_template") or cls.get_processor_dict(path, **hub)[0].get("chat_template")
        if chat_template is None and IMAGE_PAD in str(tokenizer.chat_template):
            chat_template = tokenizer.chat_template
        return cls(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> BatchFeature:
        """As `keye_kernels.KeyeProcessor.__call__`; settings of the image processor may be given for one call.

        Rows are padded on the tokenizer's `padding_side` unless the call gives one. Arguments may stand in
        `text_kwargs`, `images_kwargs`, `videos_kwargs` and `common_kwargs` as well; those given directly come first.
        Of the arguments that transformers has for tokenizers, those are taken and ignored that change nothing here; a
        request to truncate is refused.
        """
        groups = [kwargs.pop(name, None) or {} for name in GROUPS]
        kwargs = {name: value for group in (*groups, kwargs) for name, value in group.items()}
        settings = {name: kwargs.pop(name) for name in SETTINGS if name in kwargs}
        if kwargs.get("truncation"):
            raise ValueError(
                f"truncation must be False, got {kwargs['truncation']!r}: a prompt that lost placeholders of its pictures "
                "cannot be answered; pass smaller max_pixels or fewer frames"
            )
        for name in IGNORED_ARGUMENTS:
            kwargs.pop(name, None)
        known = (*CALL_ARGUMENTS, *EDITIONS[self.edition].video_kwargs)
        unknown = [name for name in kwargs if name not in known]
        if unknown:
            raise TypeError(f"unexpected keyword arguments {unknown}: this processor takes {[*known, *SETTINGS]}")
        given = {"padding_side": self.tokenizer.padding_side}
        given |= {name: value for name, value in kwargs.items() if value is not None}
        return BatchFeature(dict(self._lean(settings)(text, images=images, videos=videos, **given)))

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        return_tensors: str = "pt",
        thinking: str | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        **variables: Any,
    ) -> Any:
        """The prompt of a conversation (or of each in a batch); with `tokenize`, the model's inputs.

        Pictures and videos stand in the parts as in the official scripts, or as transformers writes them (`url`, `path`,
        `base64`). `processor_kwargs` are for `__call__`; so are those of `variables` that it knows by name. The others
        are for the template.
        """
        messages = _official(conversation)
        known = (*CALL_ARGUMENTS, *EDITIONS[self.edition].video_kwargs, *SETTINGS, *GROUPS)
        options = {name: variables.pop(name) for name in known if name in variables} | dict(processor_kwargs or {})
        lean = self._lean({}, chat_template)
        prompt = lean.apply_chat_template(
            messages,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            thinking=thinking,
            **variables,
        )
        if continue_final_message:
            prompt = _without_ending(prompt, messages)
        if not tokenize:
            return prompt
        images, videos, found = process_vision_info(messages, True, edition=self.edition)
        inputs = self(images, prompt, videos, return_tensors=return_tensors, **{**found, **options})
        return inputs if return_dict else inputs["input_ids"]

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> list[str]:
        """As everywhere in transformers, and `preprocessor_config.json`, which version 5 leaves out and others read."""
        files = super().save_pretrained(save_directory, **kwargs)
        return [*files, *self.image_processor.save_pretrained(save_directory)]

    @property
    def model_input_names(self) -> list[str]:
        videos = ["pixel_values_videos", "video_grid_thw"]
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names, *videos]

    def _lean(self, settings: Mapping[str, Any], chat_template: str | None = None) -> LeanProcessor:
        tokenizer = KeyeTokenizer(
            self.tokenizer.backend_tokenizer, eos_token=self.tokenizer.eos_token, pad_token=self.tokenizer.pad_token
        )
        template = chat_template or self.chat_template
        return LeanProcessor(tokenizer, self.image_processor.patch_config(settings), template, self.edition)


class KeyeVL1_5Processor(KeyeProcessor):
    """That of 1.5: slow and fast frames, their times written between them."""

    edition = KeyeVL1_5ImageProcessor.edition
    image_processor_type = KeyeVL1_5ImageProcessor
    frame_token, fast_start, fast_end = FRAME, FAST_START, FAST_END


PROCESSORS = {"Keye": KeyeProcessor, "KeyeVL1_5": KeyeVL1_5Processor}


def _official(conversation: Sequence[Any]) -> Any:
    """The conversation(s), with pictures and videos under the names that Keye's scripts use."""
    messages = getattr(conversation, "messages", conversation)
    split_conversations(messages)
    if not isinstance(messages[0], Mapping):
        return [_official(one) for one in messages]
    return [
        {**turn, "content": [_official_part(part) for part in turn["content"]]}
        if isinstance(turn["content"], (list, tuple))
        else turn
        for turn in messages
    ]


def _official_part(part: Mapping[str, Any]) -> Mapping[str, Any]:
    kind = part.get("type")
    source = next((name for name in SOURCES if name in part), None)
    if kind not in ("image", "video") or kind in part or source is None:
        return part
    value = f"data:image;base64,{part[source]}" if source == "base64" else part[source]
    return {**{name: other for name, other in part.items() if name != source}, kind: value}


def _without_ending(prompt: str | list[str], messages: Sequence[Any]) -> Any:
    """The prompt(s) up to the end of the last message's text, so that the model goes on with it."""
    if not isinstance(prompt, str):
        return [_without_ending(one, turns) for one, turns in zip(prompt, messages, strict=True)]
    content = messages[-1]["content"]
    text = content if isinstance(content, str) else content[-1].get("text")
    if not text or text.strip() not in prompt:
        raise ValueError("continue_final_message needs a last message that ends in text, and a template that writes it")
    return prompt[: prompt.rindex(text.strip()) + len(text.strip())]
