"""Chat templates, thinking modes, and splitting an answer into its parts."""

import copy
import json

import pytest

from keye_kernels.processing import process_vision_info, split_thinking
from keye_kernels.processing.prompts import DEFAULT_CHAT_TEMPLATE, load_chat_template, render_chat_template
from tests.helpers.messages import IMAGE, VIDEO, random_image, text_part, user

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def test_a_conversation_gives_the_official_prompt(processor):
    messages = user({"type": "image", "image": random_image()}, text_part("What?"))
    assert processor.apply_chat_template(messages) == (
        f"{SYSTEM}<|im_start|>user\n{IMAGE}What?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_default_template_handles_roles_parts_and_options():
    messages = [
        {"role": "system", "content": "Be brief."},
        *user({"image": "a.png"}, {"type": "image_url", "image_url": "b.png"}, {"video": "c.mp4"}, {"text": "Hi"}),
        {"role": "assistant", "content": "Yes"},
    ]
    assert render_chat_template(DEFAULT_CHAT_TEMPLATE, messages, add_generation_prompt=False) == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{IMAGE}{IMAGE}{VIDEO}Hi<|im_end|>\n"
        "<|im_start|>assistant\nYes<|im_end|>\n"
    )
    numbered = render_chat_template(DEFAULT_CHAT_TEMPLATE, messages, add_vision_id=True)
    assert f"Picture 1: {IMAGE}Picture 2: {IMAGE}Video 1: {VIDEO}Hi" in numbered


def test_a_batch_of_conversations_gives_a_list(processor):
    prompts = processor.apply_chat_template([user(text_part("a")), user(text_part("b"))])
    assert [prompt.count("<|im_start|>user") for prompt in prompts] == [1, 1]
    assert isinstance(processor.apply_chat_template(user(text_part("a"))), str)


@pytest.mark.parametrize(("thinking", "suffix"), [(None, ""), ("auto", ""), ("think", "/think"), ("no_think", "/no_think")])
def test_thinking_modes_append_to_the_last_user_text_without_changing_the_messages(processor, thinking, suffix):
    messages = [
        *user(text_part("first")),
        {"role": "assistant", "content": "reply"},
        *user(text_part("second"), {"type": "image", "image": random_image()}),
        {"role": "assistant", "content": "so far"},
    ]
    before = copy.deepcopy(messages)
    prompt = processor.apply_chat_template(messages, thinking=thinking)
    assert f"second{suffix}{IMAGE}<|im_end|>" in prompt
    assert "first<|im_end|>" in prompt
    assert messages == before


def test_thinking_works_for_plain_strings_and_for_images_without_text(processor):
    plain = processor.apply_chat_template([{"role": "user", "content": "Hi"}], thinking="think")
    assert "user\nHi/think<|im_end|>" in plain
    alone = processor.apply_chat_template(user({"type": "image", "image": random_image()}), thinking="no_think")
    assert f"{IMAGE}/no_think<|im_end|>" in alone


def test_an_unknown_mode_is_rejected(processor):
    with pytest.raises(ValueError, match="thinking must be one of"):
        processor.apply_chat_template(user(text_part("a")), thinking="deep")


@pytest.mark.parametrize("content", ["", None, [], [{"type": "text", "text": ""}]])
def test_an_empty_conversation_is_rejected(processor, content):
    with pytest.raises(ValueError, match="the prompt is empty"):
        processor.apply_chat_template([{"role": "user", "content": content}])


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], ValueError),
        ([[]], ValueError),
        ("hello", TypeError),
        ({"role": "user"}, TypeError),
        ([{"content": "x"}], ValueError),
        ([{"role": "user", "content": 3}], TypeError),
        ([{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}], ValueError),
    ],
)
def test_invalid_messages_are_rejected(processor, messages, error):
    with pytest.raises(error):
        processor.apply_chat_template(messages)
    with pytest.raises(error):
        process_vision_info(messages, edition=processor.edition)


def test_templates_are_found_in_the_order_of_transformers(tmp_path):
    assert load_chat_template(tmp_path) == DEFAULT_CHAT_TEMPLATE
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "text only"}))
    assert load_chat_template(tmp_path) == DEFAULT_CHAT_TEMPLATE
    config.write_text(json.dumps({"chat_template": [{"name": "default", "template": "T<|image_pad|>"}]}))
    assert load_chat_template(tmp_path) == "T<|image_pad|>"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "J"}))
    assert load_chat_template(tmp_path) == "J"
    (tmp_path / "chat_template.jinja").write_text("R")
    assert load_chat_template(tmp_path) == "R"


def test_templates_render_as_in_transformers():
    template = (
        "{% for message in messages %}\n  {% if loop.index > 1 %}\n{% break %}\n  {% endif %}\n"
        "{{ message | tojson }}{% endfor %}{{ strftime_now('%Y')|length }}"
    )
    rendered = render_chat_template(template, [{"role": "user", "content": "<é>"}] * 2)
    assert rendered == '{"role": "user", "content": "<é>"}4'


def test_a_template_that_raises_or_is_invalid_gives_a_clear_error():
    turn = [{"role": "user", "content": "x"}]
    with pytest.raises(ValueError, match="the chat template failed: roles must alternate"):
        render_chat_template("{{ raise_exception('roles must alternate') }}", turn)
    with pytest.raises(ValueError, match="not valid"):
        render_chat_template("{% if %}", turn)


def test_a_template_has_no_access_to_the_callers_objects():
    messages = user({"type": "image", "image": random_image()}, text_part("x"))
    assert render_chat_template("{{ messages[0].content[0].image }}", messages) == "Image"
    with pytest.raises(ValueError, match="unsafe"):
        render_chat_template("{{ messages.__class__.__mro__ }}", messages)


def test_the_template_agrees_with_transformers():
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [*user({"type": "image", "image": "a.png"}, text_part("Hi <b>")), {"role": "assistant", "content": "x"}]
    for options in ({}, {"add_vision_id": True}):
        rendered, _ = utils.render_jinja_template(
            [messages], chat_template=DEFAULT_CHAT_TEMPLATE, add_generation_prompt=True, **options
        )
        assert render_chat_template(DEFAULT_CHAT_TEMPLATE, messages, **options) == rendered[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", ("", "", "plain")),
        ("", ("", "", "")),
        ("<analysis>easy</analysis>The answer", ("easy", "", "The answer")),
        ("<think>\nlong\n</think>\n\n<answer>\n4\n</answer>", ("", "long", "4")),
        ("<analysis>hard</analysis>\n<think>t</think><answer>4</answer>", ("hard", "t", "4")),
        ("the prompt opened it</think>4", ("", "the prompt opened it", "4")),
        ("<analysis>so f", ("so f", "", "")),
        ("<analysis>so far</anal", ("so far", "", "")),
        ("<analysis>a</analysis><thi", ("a", "", "")),
        ("<think>still", ("", "still", "")),
        ("<think>t</think><answer>half an ans", ("", "t", "half an ans")),
        ("<think>t</think><answer>done</answ", ("", "t", "done")),
        ("if a < b and <b>", ("", "", "if a < b and <b>")),
    ],
)
def test_split_thinking_splits_answers(text, expected):
    parts = split_thinking(text)
    assert (parts.analysis, parts.thought, parts.answer) == expected


@pytest.mark.parametrize("template", [5, b"{{ messages }}", ["a"]], ids=str)
def test_a_template_must_be_a_string(template):
    with pytest.raises(TypeError, match="chat_template must be a string, got"):
        render_chat_template(template, [{"role": "user", "content": "x"}])


def test_split_thinking_never_returns_a_tag_during_streaming():
    text = "<analysis>a</analysis><think>t</think><answer>42</answer>"
    for end in range(len(text) + 1):
        parts = split_thinking(text[:end])
        assert not any(set("<>/") & set(part) for part in parts), (text[:end], parts)
        assert all(full.startswith(part) for full, part in zip(("a", "t", "42"), parts, strict=True))
