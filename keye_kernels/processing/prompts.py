"""Conversations to prompts: the checkpoint's chat template, thinking modes, and answers taken apart again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .tokenizer import read_json

if TYPE_CHECKING:
    from jinja2 import Template

THINKING_SUFFIXES = {None: "", "auto": "", "think": "/think", "no_think": "/no_think"}

# The processor template of both editions, for checkpoints that bring none.
DEFAULT_CHAT_TEMPLATE = """\
{%- set counter = namespace(image=0, video=0) -%}
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content or [] -%}
{%- if part.type in ('image', 'image_url') or 'image' in part or 'image_url' in part -%}
{%- set counter.image = counter.image + 1 -%}
{{- 'Picture ' ~ counter.image ~ ': ' if add_vision_id else '' -}}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'video' or 'video' in part -%}
{%- set counter.video = counter.video + 1 -%}
{{- 'Video ' ~ counter.video ~ ': ' if add_vision_id else '' -}}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' if add_generation_prompt else '' -}}
"""


def load_chat_template(path: str | Path) -> str:
    """The chat template that transformers' processor would use for a checkpoint's folder.

    ``chat_template.jinja`` comes before ``chat_template.json``. The tokenizer's own template in
    ``tokenizer_config.json`` counts only if it knows pictures: Preview's is a text-only one. Keye's default is used
    if none is left.

    Raises:
        ValueError: a file that cannot be read.
    """
    folder = Path(path)
    jinja_file = folder / "chat_template.jinja"
    if jinja_file.is_file():
        return jinja_file.read_text(encoding="utf-8")
    json_file = folder / "chat_template.json"
    if json_file.is_file():
        template = read_json(json_file).get("chat_template")
        if not isinstance(template, str):
            raise ValueError(f"{json_file} must hold a string under 'chat_template'")
        return template
    template = read_json(folder / "tokenizer_config.json", default={}).get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if isinstance(template, str) and "<|image_pad|>" in template:
        return template
    return DEFAULT_CHAT_TEMPLATE


def render_chat_template(
    template: str,
    conversation: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    thinking: str | None = None,
    **variables: Any,
) -> str:
    """The prompt of one conversation.

    Args:
        template: a Jinja template as transformers defines them.
        conversation: turns with ``role`` and ``content``; never modified.
        add_generation_prompt: end with the opening of the assistant's turn.
        thinking: "think" or "no_think" puts that mode's suffix at the end of the last user text; None or "auto"
            leaves the choice to the model.
        variables: further names the template may read, such as ``add_vision_id``.

    Raises:
        ValueError: an unknown mode, no user turn to put it in, or a template that fails.
    """
    from jinja2 import TemplateError

    if thinking not in THINKING_SUFFIXES:
        raise ValueError(f"thinking must be one of {list(THINKING_SUFFIXES)}, got {thinking!r}")
    turns = [_plain(turn) for turn in conversation]
    if not any(_has_content(turn["content"]) for turn in turns):
        raise ValueError("the prompt is empty: no turn in messages has text, an image or a video")
    if THINKING_SUFFIXES[thinking]:
        _append_to_last_user_text(turns, THINKING_SUFFIXES[thinking])
    try:
        return _compile(template).render(messages=turns, add_generation_prompt=add_generation_prompt, **variables)
    except TemplateError as error:
        raise ValueError(f"the chat template failed: {error}") from error


class SplitAnswer(NamedTuple):
    """Parts of a generated text; a part that is missing is an empty string."""

    analysis: str
    thought: str
    answer: str


def split_thinking(text: str) -> SplitAnswer:
    """Takes a generated text apart: analysis of the question, thought, answer.

    Keye writes ``<analysis>...</analysis>`` in auto mode, then ``<think>...</think>`` and ``<answer>...</answer>``, all
    of them optional. A text that is still being streamed works too: an open part holds what there is so far, and a tag
    that is cut off at the end of the text is left out until it is complete.

    Args:
        text: what the model generated, without the prompt.

    Returns:
        ``(analysis, thought, answer)`` without the tags and without white space around each.
    """
    rest = _without_partial_tag(text)
    analysis, rest = _take_part(rest, "analysis")
    thought, rest = _take_part(rest, "think")
    answer = rest.replace("<answer>", "").replace("</answer>", "")
    return SplitAnswer(analysis.strip(), thought.strip(), answer.strip())


_TAGS = tuple(f"<{slash}{name}>" for name in ("analysis", "think", "answer") for slash in ("", "/"))


def _take_part(text: str, name: str) -> tuple[str, str]:
    """``(inside, after)`` of a leading tag; the opening tag may have been part of the prompt."""
    opening, closing = f"<{name}>", f"</{name}>"
    inside, found, after = text.partition(closing)
    if inside.lstrip().startswith(opening):
        return inside.lstrip().removeprefix(opening), after
    if found and not any(tag in inside for tag in _TAGS):
        return inside, after
    return "", text


def _without_partial_tag(text: str) -> str:
    start = text.rfind("<")
    if start >= 0 and any(tag.startswith(text[start:]) and tag != text[start:] for tag in _TAGS):
        return text[:start]
    return text


def _append_to_last_user_text(turns: list[dict[str, Any]], suffix: str) -> None:
    for turn in reversed(turns):
        if turn["role"] != "user":
            continue
        if isinstance(turn["content"], list):
            texts = [part for part in turn["content"] if "text" in part]
            if texts:
                texts[-1]["text"] += suffix
            else:
                turn["content"].append({"type": "text", "text": suffix})
        else:
            turn["content"] = (turn["content"] or "") + suffix
        return
    raise ValueError("thinking needs a turn with role 'user' in messages to append the mode to")


def _has_content(content: Any) -> bool:
    if isinstance(content, list):
        return any(part.get("text", True) for part in content)
    return bool(content)


def _plain(value: Any) -> Any:
    """A copy made of plain data: templates are foreign code and shall not get hold of picture objects."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return type(value).__name__


@lru_cache(maxsize=8)
def _compile(source: str) -> Template:
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # The settings of transformers, which chat templates are written for.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template is not valid: {error}") from error


def _tojson(value: Any, **options: Any) -> str:
    # Jinja's own filter escapes HTML characters.
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
