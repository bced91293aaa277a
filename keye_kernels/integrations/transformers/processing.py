"""Processors with the interface of transformers, on top of `keye_kernels.KeyeProcessor` (here `LeanProcessor`)."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoTokenizer, BatchFeature, PretrainedConfig
from transformers.processing_utils import ProcessorMixin
from transformers.utils.chat_template_utils import get_json_schema

from keye_kernels.editions import EDITIONS, PREVIEW, V1_5
from keye_kernels.processing import KeyeProcessor as LeanProcessor
from keye_kernels.processing import process_vision_info
from keye_kernels.processing.prompts import DEFAULT_CHAT_TEMPLATE
from keye_kernels.processing.tokenizer import FAST_END, FAST_START, FRAME, IMAGE_PAD, VIDEO_PAD, KeyeTokenizer
from keye_kernels.processing.vision_info import split_conversations

from .image_processing import SETTINGS, KeyeVL1_5ImageProcessor, SiglipImageProcessor

# Arguments of transformers that the lean processor takes
CALL_ARGUMENTS = ("padding", "padding_side", "return_tensors")
# Arguments of transformers without effect here
IGNORED_ARGUMENTS = (
    *("add_special_tokens", "truncation", "max_length"),
    *("return_attention_mask", "return_token_type_ids", "return_mm_token_type_ids"),
)
# Arguments of apply_chat_template that only have their default here
DEFAULT_TEMPLATE_ARGUMENTS = ("documents", "return_assistant_tokens_mask", "load_audio_from_video", "sanitize_control_tokens")
# transformers groups arguments in these dictionaries; here they are merged
GROUPS = ("common_kwargs", "text_kwargs", "images_kwargs", "videos_kwargs")
# Keys of an image's or video's source in transformers' conversations
SOURCES = ("url", "path", "base64")
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
PARTS = ("tokenizer", "image_processor", "chat_template", "padding_side")
# Other arguments that the Auto classes and their callers pass to from_pretrained
IGNORED_BY_LOADING = (
    *("use_fast", "backend", "trust_remote_code", "code_revision", "proxies", "resume_download", "use_auth_token"),
    *("config", "user_agent", "repo_type", "_from_auto", "_from_pipeline", "_commit_hash"),
)


class KeyeProcessor(ProcessorMixin):
    """The processor of Preview, for `processor(text=..., images=..., videos=..., **video_kwargs)`.

    Args:
        image_processor: the image processor of the same edition.
        tokenizer: a fast tokenizer.
        chat_template: Jinja template; default: Keye's.

    Attributes:
        edition: "preview" or "1.5", for `keye_kernels.process_vision_info`.
        image_token, video_token: the placeholders, with their ids in `image_token_id` and `video_token_id`.

    Raises:
        TypeError: the tokenizer is not a fast one, or the image processor is not that of this edition.
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
        """Loads the processor of a checkpoint. The edition is read from `config.json`, if there is one.

        Args:
            pretrained_model_name_or_path: folder or name of a repository.
            **kwargs: settings of the image processor, such as `min_pixels` and `max_pixels`; an already loaded `tokenizer` or
                `image_processor`; `chat_template`; `padding_side`, default "left" (a given `tokenizer` keeps its own);
                transformers' `cache_dir`, `token`, `revision`, ...

        Raises:
            TypeError: unknown argument.
        """
        known = (*SETTINGS, *PARTS, *HUB_ARGUMENTS)
        # vLLM also passes the arguments of a request
        of_calls = (
            *CALL_ARGUMENTS,
            *IGNORED_ARGUMENTS,
            *GROUPS,
            *(name for edition in EDITIONS.values() for name in edition.video_kwargs),
        )
        unknown = [name for name in kwargs if name not in (*known, *IGNORED_BY_LOADING, *of_calls)]
        # A pipeline also passes the arguments of the model
        if unknown and "_from_pipeline" not in kwargs:
            raise TypeError(f"unexpected keyword arguments {unknown}: from_pretrained of this processor takes {list(known)}")
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
            # Generation needs left padding, which many checkpoint files do not set
            tokenizer.padding_side = "left"
        if kwargs.get("padding_side") is not None:
            tokenizer.padding_side = kwargs["padding_side"]
        chat_template = kwargs.get("chat_template") or cls.get_processor_dict(path, **hub)[0].get("chat_template")
        if chat_template is None and IMAGE_PAD in str(tokenizer.chat_template):
            chat_template = tokenizer.chat_template
        return cls(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> BatchFeature:
        """Prepares the model's inputs, like `keye_kernels.KeyeProcessor.__call__`.

        Args:
            images: the images of all prompts, in order.
            text: a prompt or a list of prompts.
            videos: the videos of all prompts, in order.
            **kwargs: `padding`, `padding_side` (default: that of the tokenizer), `return_tensors`, the video arguments of
                the edition and settings of the image processor for this call; also in `text_kwargs`, `images_kwargs`,
                `videos_kwargs` and `common_kwargs`, over which direct arguments take precedence. Arguments of transformers'
                tokenizers that have no effect here are ignored.

        Raises:
            ValueError: `truncation` is set, or the inputs do not match.
            TypeError: unknown argument.
        """
        groups = [kwargs.pop(name, None) or {} for name in GROUPS]
        kwargs = {name: value for group in (*groups, kwargs) for name, value in group.items()}
        settings = {name: kwargs.pop(name) for name in SETTINGS if name in kwargs}
        if kwargs.get("truncation"):
            raise ValueError(
                f"truncation must be False, got {kwargs['truncation']!r}: it could remove placeholders of images; "
                "pass a smaller max_pixels or fewer frames instead"
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
        tools: Sequence[Any] | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        **variables: Any,
    ) -> Any:
        """Renders the prompt of a conversation, or of each conversation of a batch.

        Args:
            conversation: messages with images and videos as in the official scripts, or under transformers' keys `url`,
                `path` and `base64`.
            chat_template: Jinja template; default: that of the processor.
            add_generation_prompt: end with the start of the assistant's turn.
            continue_final_message: end with the text of the last message, without trailing white space, so that the model
                continues it.
            tokenize: return the model's inputs instead of the prompt.
            return_dict: with `tokenize`, return all inputs and not only the ids.
            return_tensors: "pt".
            thinking: None, "think", "no_think" or "auto".
            tools: functions or their JSON schemas, for a template that uses `tools`.
            processor_kwargs: arguments of `__call__`.
            **variables: arguments of `__call__`, or variables of the template.

        Raises:
            ValueError: an argument has an unsupported value.
            TypeError: a name is neither an argument of `__call__` nor a variable of the template.
        """
        messages = _official(conversation)
        known = (*CALL_ARGUMENTS, *IGNORED_ARGUMENTS, *EDITIONS[self.edition].video_kwargs, *SETTINGS, *GROUPS)
        options = {name: variables.pop(name) for name in known if name in variables} | dict(processor_kwargs or {})
        variables = {name: value for name, value in variables.items() if value or name not in DEFAULT_TEMPLATE_ARGUMENTS}
        if tools is not None:
            tools = [get_json_schema(tool) if callable(tool) else tool for tool in tools]
        prompt = self._lean({}, chat_template).apply_chat_template(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            thinking=thinking,
            tools=tools,
            **variables,
        )
        if not tokenize:
            return prompt
        images, videos, found = self.process_vision_info(messages, True)
        inputs = self(images, prompt, videos, return_tensors=return_tensors, **{**found, **options})
        return inputs if return_dict else inputs["input_ids"]

    def process_vision_info(self, messages: Any, return_video_kwargs: bool = False, **options: Any) -> tuple[Any, ...]:
        """Calls `keye_kernels.process_vision_info` with the edition of this processor; arguments, results and errors are its."""
        return process_vision_info(messages, return_video_kwargs, edition=self.edition, **options)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> list[str]:
        """Saves like transformers, and adds `preprocessor_config.json`, which transformers 5 does not write."""
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
    """The processor of 1.5, with slow and fast frames and timestamps in the prompt."""

    edition = KeyeVL1_5ImageProcessor.edition
    image_processor_type = KeyeVL1_5ImageProcessor
    frame_token, fast_start, fast_end = FRAME, FAST_START, FAST_END


PROCESSORS = {PREVIEW.model_type: KeyeProcessor, V1_5.model_type: KeyeVL1_5Processor}


def _official(conversation: Sequence[Any]) -> Any:
    """The conversation, or the batch, with images and videos under the keys of the official scripts."""
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
