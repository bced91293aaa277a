"""Renders conversations to prompts with the checkpoint's chat template, and splits answers into thinking and answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .tokenizer import IMAGE_PAD, read_json, read_text

# Marks the end of the last message in a rendered prompt; no message contains a NUL character around this name.
END_MARK = "\0end of the final message\0"
THINKING_SUFFIXES = {None: "", "auto": "", "think": "/think", "no_think": "/no_think"}

# The template of both editions' processors, for checkpoints without a template.
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
    """Loads the chat template that the processor of transformers would use for the checkpoint in this folder.

    Looks for `chat_template.jinja`, then `chat_template.json`, then the tokenizer's template in `tokenizer_config.json`, which is
    skipped if it has no image placeholder; Preview's is text-only. Otherwise returns Keye's default template.
    """
    folder = Path(path)
    jinja_file = folder / "chat_template.jinja"
    if jinja_file.is_file():
        return read_text(jinja_file)
    json_file = folder / "chat_template.json"
    if json_file.is_file():
        template = read_json(json_file).get("chat_template")
        if not isinstance(template, str):
            raise ValueError(f"{json_file} must hold a string under 'chat_template'")
        return template
    tokenizer_file = folder / "tokenizer_config.json"
    template = read_json(tokenizer_file, default={}).get("chat_template")
    if isinstance(template, list):
        if not all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in template):
            raise ValueError(f"{tokenizer_file}: a list under 'chat_template' must hold objects with 'name' and 'template'")
        template = {entry["name"]: entry.get("template") for entry in template}.get("default")
    if isinstance(template, str) and IMAGE_PAD in template:
        return template
    return DEFAULT_CHAT_TEMPLATE


def render_chat_template(
    template: str,
    conversation: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    thinking: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    convert_text: Callable[[str], str] | None = None,
    **variables: Any,
) -> str:
    """Renders the prompt of one conversation with a Jinja template in the form that transformers defines.

    `thinking`: "think" or "no_think" appends that mode's suffix to the last user text; None or "auto" lets the model decide.
    `convert_text` is applied to every string of the conversation and of `tools`. `variables` are other variables of the template.
    Raises TypeError for a variable that the template does not use, and ValueError for an unknown mode, no user turn for its
    suffix, no final text to continue, an empty prompt, or a template that fails.
    """
    # Imports jinja2, which is loaded only if a template is rendered.
    from .templates import render_template, template_variables

    if not isinstance(template, str):
        raise TypeError(f"chat_template must be a string, got {type(template).__name__}")
    if not isinstance(thinking, str | None) or thinking not in THINKING_SUFFIXES:
        raise ValueError(f"thinking must be one of {list(THINKING_SUFFIXES)}, got {thinking!r}")
    accepted = template_variables(template) - {"messages", "add_generation_prompt", "tools"}
    unknown = sorted(set(variables) - accepted)
    if unknown:
        raise TypeError(
            f"unexpected keyword arguments {unknown}: they are neither arguments of apply_chat_template nor variables of "
            f"the chat template, which uses {sorted(accepted)}"
        )
    if tools:
        if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
            raise TypeError("tools must be a list of dictionaries, the JSON schemas of the functions")
        if "tools" not in template_variables(template):
            raise ValueError("the chat template does not use tools; leave tools out or pass chat_template")
        variables["tools"] = _to_plain_data(tools, convert_text)
    turns = [_to_plain_data(turn, convert_text) for turn in conversation]
    for turn in turns:
        if isinstance(turn["content"], list):
            turn["content"] = [_official_part(part) for part in turn["content"]]
    if not any(_has_content(turn["content"]) for turn in turns):
        raise ValueError("the prompt is empty: no turn in messages has text, an image or a video")
    if THINKING_SUFFIXES[thinking]:
        _append_to_last_user_text(turns, THINKING_SUFFIXES[thinking])
    if continue_final_message:
        add_generation_prompt = False
        _mark_end(turns[-1])
    prompt = render_template(template, {**variables, "messages": turns, "add_generation_prompt": add_generation_prompt})
    if continue_final_message:
        prompt, mark, _ = prompt.rpartition(END_MARK)
        if not mark:
            raise ValueError("continue_final_message needs a last message that the chat template renders")
        prompt = prompt.rstrip()
    return prompt


class SplitAnswer(NamedTuple):
    """The parts of a generated text; a missing part is an empty string.

    `analysis` says how difficult the model finds the question (auto mode), `thought` is the reasoning.
    """

    analysis: str
    thought: str
    answer: str


def split_thinking(text: str) -> SplitAnswer:
    """Splits a generated text into analysis, thought and answer.

    Keye generates `<analysis>...</analysis>` (auto mode only), `<think>...</think>` and `<answer>...</answer>`, in this
    order. Each part is optional. The text may be incomplete, as during streaming: a part without its closing tag contains
    the text generated so far, and an incomplete tag at the end of the text is left out.

    Args:
        text: the generated text, without the prompt.

    Returns:
        `(analysis, thought, answer)`, without tags and without surrounding white space.
    """
    rest = _remove_incomplete_tag(text)
    analysis, rest = _split_part(rest, "analysis")
    thought, rest = _split_part(rest, "think")
    answer = rest.replace("<answer>", "").replace("</answer>", "")
    return SplitAnswer(analysis.strip(), thought.strip(), answer.strip())


_TAGS = tuple(f"<{slash}{name}>" for name in ("analysis", "think", "answer") for slash in ("", "/"))


def _split_part(text: str, name: str) -> tuple[str, str]:
    """Returns the text inside and after the first part; its opening tag may have been in the prompt."""
    opening, closing = f"<{name}>", f"</{name}>"
    inside, found, after = text.partition(closing)
    if inside.lstrip().startswith(opening):
        return inside.lstrip().removeprefix(opening), after
    if found and not any(tag in inside for tag in _TAGS):
        return inside, after
    return "", text


def _remove_incomplete_tag(text: str) -> str:
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
    raise ValueError("thinking needs a turn with role 'user' in messages, to append the mode's suffix to its text")


def _mark_end(turn: dict[str, Any]) -> None:
    """Appends `END_MARK` to the text of a turn. A search for the text itself could find it in the template's own text."""
    parts, key = (turn["content"][-1:], "text") if isinstance(turn["content"], list) else ([turn], "content")
    if not parts or not parts[0].get(key):
        raise ValueError("continue_final_message needs a last message that ends in text")
    parts[0][key] += END_MARK


def _has_content(content: Any) -> bool:
    if isinstance(content, list):
        return any(part.get("text", True) for part in content)
    return bool(content)


def _official_part(part: dict[str, Any]) -> dict[str, Any]:
    """A part with the keys that Keye's templates know: `video` instead of `video_url`."""
    if "video_url" in part or part.get("type") == "video_url":
        return {**part, "type": "video", "video": part.get("video_url")}
    return part


def _to_plain_data(value: Any, convert_text: Callable[[str], str] | None) -> Any:
    """Copies the value as plain data. A template is untrusted code and must not get access to image objects."""
    if isinstance(value, Mapping):
        return {str(key): _to_plain_data(item, convert_text) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_plain_data(item, convert_text) for item in value]
    if isinstance(value, str) and convert_text is not None:
        return convert_text(value)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return type(value).__name__
