"""From conversations to the model's inputs, for both editions."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from keye_kernels.processing import KeyeProcessor, process_vision_info, split_thinking
from keye_kernels.processing.packing import pack_video
from keye_kernels.processing.patches import PatchConfig
from keye_kernels.processing.prompts import DEFAULT_CHAT_TEMPLATE, load_chat_template, render_chat_template
from keye_kernels.processing.tokenizer import SPECIAL_TOKENS, KeyeTokenizer, build_byte_tokenizer
from tests.helpers.golden import golden, load_golden
from tests.helpers.small_tokenizer import write_processor_files

PIXEL_ATOL = 1e-6
# Same 8-bit resize as the reference, so what is left is float32 rounding (tolerance of the golden README).
PACKED_ATOL = 1e-5

IMAGE, VIDEO = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@pytest.fixture(scope="module", params=["preview", "1.5"])
def processor(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return KeyeProcessor.from_pretrained(write_processor_files(folder, request.param))


@pytest.fixture(scope="module")
def preview(tmp_path_factory):
    return KeyeProcessor.from_pretrained(write_processor_files(tmp_path_factory.mktemp("preview"), "preview"))


@pytest.fixture(scope="module")
def v1_5(tmp_path_factory):
    return KeyeProcessor.from_pretrained(write_processor_files(tmp_path_factory.mktemp("v1_5"), "1.5"))


def picture(height=56, width=84, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def text_part(text):
    return {"type": "text", "text": text}


# ------------------------------------------------------------------------------------------------------------ prompts


def test_a_conversation_becomes_the_official_prompt(processor):
    messages = user({"type": "image", "image": picture()}, text_part("What?"))
    assert processor.apply_chat_template(messages) == (
        f"{SYSTEM}<|im_start|>user\n{IMAGE}What?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_default_template_follows_turns_kinds_and_options():
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


@pytest.mark.parametrize(
    ("thinking", "suffix"), [(None, ""), ("auto", ""), ("think", "/think"), ("no_think", "/no_think")]
)
def test_thinking_modes_append_to_the_last_user_text_without_changing_the_messages(processor, thinking, suffix):
    messages = [
        *user(text_part("first")),
        {"role": "assistant", "content": "reply"},
        *user(text_part("second"), {"type": "image", "image": picture()}),
        {"role": "assistant", "content": "so far"},
    ]
    before = copy.deepcopy(messages)
    prompt = processor.apply_chat_template(messages, thinking=thinking)
    assert f"second{suffix}{IMAGE}<|im_end|>" in prompt
    assert "first<|im_end|>" in prompt
    assert messages == before


def test_thinking_works_for_plain_strings_and_for_pictures_alone(processor):
    plain = processor.apply_chat_template([{"role": "user", "content": "Hi"}], thinking="think")
    assert "user\nHi/think<|im_end|>" in plain
    alone = processor.apply_chat_template(user({"type": "image", "image": picture()}), thinking="no_think")
    assert f"{IMAGE}/no_think<|im_end|>" in alone


def test_an_unknown_mode_is_refused(processor):
    with pytest.raises(ValueError, match="thinking must be one of"):
        processor.apply_chat_template(user(text_part("a")), thinking="deep")


@pytest.mark.parametrize("content", ["", None, [], [{"type": "text", "text": ""}]])
def test_an_empty_conversation_is_refused(processor, content):
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
def test_what_is_no_conversation_is_refused(processor, messages, error):
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


def test_a_template_that_raises_or_is_broken_gives_a_clear_error():
    turn = [{"role": "user", "content": "x"}]
    with pytest.raises(ValueError, match="the chat template failed: roles must alternate"):
        render_chat_template("{{ raise_exception('roles must alternate') }}", turn)
    with pytest.raises(ValueError, match="not valid"):
        render_chat_template("{% if %}", turn)


def test_a_template_cannot_reach_the_callers_objects():
    messages = user({"type": "image", "image": picture()}, text_part("x"))
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


# ------------------------------------------------------------------------------------------------------------- images


def test_official_calls_give_the_models_inputs(processor):
    messages = user(
        {"type": "image", "image": picture(56, 84)},
        {"type": "image", "image": picture(61, 40, 1)},
        text_part("Compare."),
    )
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images, videos, kwargs = process_vision_info(messages, return_video_kwargs=True, edition=processor.edition)
    inputs = processor(text=text, images=images, videos=videos, padding=True, return_tensors="pt", **kwargs).to("cpu")
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values", "image_grid_thw"}
    assert inputs.image_grid_thw.tolist() == [[1, 4, 6], [1, 6, 4]]
    assert inputs.pixel_values.shape == (48, 3, 14, 14)
    assert (inputs.input_ids == processor.image_token_id).sum() == 12
    assert inputs.input_ids.dtype == inputs.attention_mask.dtype == inputs.image_grid_thw.dtype == torch.int64
    expanded = text.replace("<|image_pad|>", "<|image_pad|>" * 6)
    assert processor.batch_decode(inputs.input_ids, skip_special_tokens=False) == [expanded]


def test_pixels_of_several_images_equal_the_official_ones(preview):
    tensors = load_golden("preview", "image_processing.safetensors")
    images = [tensors[f"image{index}.uint8"].numpy() for index in range(3)]
    inputs = preview(text=IMAGE * 3, images=images)
    assert torch.equal(inputs.image_grid_thw, tensors["all.image_grid_thw"])
    expected = torch.cat([tensors[f"image{index}.pixel_values"] for index in range(3)])
    torch.testing.assert_close(inputs.pixel_values, expected, atol=PIXEL_ATOL, rtol=0)


def test_a_batch_is_padded_on_the_left_and_its_images_stay_in_order(processor):
    prompts = [f"{IMAGE}a", "bb", f"{IMAGE}ccc{IMAGE}"]
    images = [picture(56, 56), picture(56, 84, 1), picture(84, 84, 2)]
    inputs = processor(text=prompts, images=images)
    alone = [processor(prompts[0], images=images[0]), processor(prompts[1]), processor(prompts[2], images=images[1:])]
    length = inputs.input_ids.shape[1]
    for row, single in enumerate(alone):
        start = length - single.input_ids.shape[1]
        assert torch.equal(inputs.input_ids[row, start:], single.input_ids[0])
        assert inputs.attention_mask[row].tolist() == [0] * start + [1] * (length - start)
        assert (inputs.input_ids[row, :start] == processor.tokenizer.pad_token_id).all()
    assert torch.equal(inputs.pixel_values, torch.cat([alone[0].pixel_values, alone[2].pixel_values]))


def test_images_may_be_nested_by_prompt(processor):
    images = [picture(seed=index) for index in range(2)]
    nested = processor([f"{IMAGE}a", f"{IMAGE}a"], images=[[images[0]], [images[1]]])
    assert torch.equal(nested.pixel_values, processor([f"{IMAGE}a"] * 2, images=images).pixel_values)


@pytest.mark.parametrize(("placeholders", "given"), [(1, 0), (0, 1), (2, 1), (1, 2)])
def test_a_wrong_number_of_images_names_both_counts(processor, placeholders, given):
    with pytest.raises(ValueError, match=rf"text holds {placeholders} image placeholders .* but {given} images"):
        processor(text="x" + IMAGE * placeholders, images=[picture()] * given)


@pytest.mark.parametrize(("placeholders", "given"), [(1, 0), (0, 1), (2, 1)])
def test_a_wrong_number_of_videos_names_both_counts(processor, placeholders, given):
    videos = [torch.zeros(2, 3, 56, 56, dtype=torch.uint8)] * given
    with pytest.raises(ValueError, match=rf"text holds {placeholders} video placeholders .* but {given} videos"):
        processor(text="x" + VIDEO * placeholders, videos=videos)


@pytest.mark.parametrize("text", ["", "  \n", ["a", ""]])
def test_an_empty_prompt_is_refused(processor, text):
    with pytest.raises(ValueError, match=r"text\[\d\] is empty"):
        processor(text=text)


def test_arguments_of_another_kind_are_refused(processor):
    with pytest.raises(TypeError, match="text must be a string"):
        processor(text=3)
    with pytest.raises(ValueError, match="at least one prompt"):
        processor(text=[])
    with pytest.raises(ValueError, match="return_tensors"):
        processor(text="a", return_tensors="np")
    with pytest.raises(ValueError, match="padding must be"):
        processor(text="a", padding="max_length")
    with pytest.raises(ValueError, match="padding=False needs prompts of equal length"):
        processor(text=["a", "bb"], padding=False)
    with pytest.raises(TypeError, match="videos must be a list"):
        processor(text="a", videos="clip.mp4")


def test_max_pixels_of_from_pretrained_limits_every_image(tmp_path):
    folder = write_processor_files(tmp_path, "preview")
    limited = KeyeProcessor.from_pretrained(folder, max_pixels=3136)
    assert limited(IMAGE, images=picture(560, 560)).image_grid_thw.tolist() == [[1, 4, 4]]
    assert KeyeProcessor.from_pretrained(folder)(IMAGE, images=picture(560, 560)).image_grid_thw.tolist() == [
        [1, 40, 40]
    ]


def test_a_side_of_zero_names_max_pixels(tmp_path):
    folder = write_processor_files(tmp_path, "preview", max_pixels=100352)
    with pytest.raises(ValueError, match="max_pixels=100352"):
        KeyeProcessor.from_pretrained(folder)(IMAGE, images=Image.new("RGB", (1999, 10)))


def test_tokenize_loads_the_pictures_as_well(processor):
    messages = user({"type": "image", "image": picture()}, text_part("Hi"))
    inputs = processor.apply_chat_template(messages, tokenize=True)
    expected = processor(processor.apply_chat_template(messages), images=picture())
    assert set(inputs) == set(expected)
    assert all(torch.equal(inputs[name], expected[name]) for name in inputs)


# ---------------------------------------------------------------------------------------------------- Preview videos


def test_process_vision_info_returns_what_the_preview_package_does():
    messages = user({"type": "image", "image": picture()}, {"type": "video", "video": [picture()] * 3, "fps": 4.0})
    images, videos = process_vision_info(messages)
    assert len(images) == 1
    assert [len(video) for video in videos] == [4]
    assert process_vision_info(messages, return_video_kwargs=True)[2] == {"fps": [4.0]}
    assert process_vision_info(user(text_part("x"))) == (None, None)
    assert process_vision_info(user(text_part("x")), True) == (None, None, {"fps": []})
    batch = process_vision_info([messages, messages])
    assert [len(found) for found in batch] == [2, 2]


def test_process_vision_info_of_1_5_always_returns_three_values():
    images, videos, kwargs = process_vision_info(user({"image": picture()}), edition="1.5")
    assert len(images) == 1
    assert videos is None
    assert set(kwargs) == {"height", "width", "fast_height", "fast_width", "timestamps", "frame_types"}


def test_a_list_of_pictures_goes_through_the_preview_processor(preview):
    frames = [picture(40, 58, seed) for seed in range(3)]
    messages = user({"type": "video", "video": frames, "fps": 3.0}, text_part("What happens?"))
    text = preview.apply_chat_template(messages)
    images, videos, kwargs = process_vision_info(messages, return_video_kwargs=True)
    inputs = preview(text=text, images=images, videos=videos, **kwargs)
    assert inputs.video_grid_thw.tolist() == [[4, 4, 6]]
    assert inputs.pixel_values_videos.shape == (96, 3, 14, 14)
    assert (inputs.input_ids == preview.video_token_id).sum() == 24
    torch.testing.assert_close(inputs.second_per_grid_ts, torch.tensor([1 / 3]))
    last, repeated = inputs.pixel_values_videos.view(4, 24, -1)[2:]
    assert torch.equal(last, repeated)


def test_frames_of_a_video_equal_the_official_ones(preview):
    tensors = load_golden("preview", "image_processing.safetensors")
    video = tensors["video0.uint8"].permute(0, 3, 1, 2)
    for same in (video, video.float()):
        inputs = preview(text=VIDEO, videos=[same])
        assert torch.equal(inputs.video_grid_thw, tensors["video0.video_grid_thw"])
        torch.testing.assert_close(inputs.pixel_values_videos, tensors["video0.pixel_values"], atol=PIXEL_ATOL, rtol=0)


@pytest.mark.parametrize(
    ("fps", "expected"),
    [(None, [0.5, 0.5]), (4, [0.25, 0.25]), ([1.0, 3.0], [1.0, 1 / 3]), (torch.tensor([1.0, 2.0]), [1.0, 0.5])],
)
def test_seconds_per_grid_come_from_fps(preview, fps, expected):
    videos = [torch.zeros(2, 3, 56, 56, dtype=torch.uint8)] * 2
    seconds = preview(text=VIDEO * 2, videos=videos, **({} if fps is None else {"fps": fps})).second_per_grid_ts
    assert seconds.dtype == torch.float32
    torch.testing.assert_close(seconds, torch.tensor(expected))


@pytest.mark.parametrize("fps", [0, -1.0, float("nan"), float("inf"), [1.0, 2.0]])
def test_an_absurd_fps_is_refused(preview, fps):
    with pytest.raises(ValueError, match="fps"):
        preview(text=VIDEO, videos=[torch.zeros(2, 3, 56, 56, dtype=torch.uint8)], fps=fps)
    if not isinstance(fps, list):
        with pytest.raises(ValueError, match="fps"):
            process_vision_info(user({"type": "video", "video": [picture()], "fps": fps}))


def test_keywords_of_the_other_edition_are_refused(preview, v1_5):
    with pytest.raises(TypeError, match=r"'height'.*edition='preview'"):
        preview(text="a", height=[28])
    with pytest.raises(TypeError, match=r"'fps'.*edition='1\.5'"):
        v1_5(text="a", fps=[2.0])


# -------------------------------------------------------------------------------------------------------- 1.5 videos


@pytest.mark.parametrize("case", ["pack_slow_fast", "pack_all_slow_no_timestamps"])
@pytest.mark.parametrize("as_lists", [True, False], ids=["lists", "tensors"])
def test_packing_equals_the_reference(v1_5, case, as_lists):
    settings = json.loads(golden("v1_5", "packing.json").read_text())[case]
    tensors = load_golden("v1_5", "cases.safetensors")
    names = ("height", "width", "fast_height", "fast_width", "frame_types", "timestamps")
    kwargs = {name: [settings[name]] for name in names if settings[name] is not None}
    if not as_lists:
        for name in ("frame_types", "timestamps"):
            if name in kwargs:
                kwargs[name] = [tensors[f"{case}.in.{name}"]]
    inputs = v1_5(text=settings["text_in"], videos=[tensors[f"{case}.in.frames"]], **kwargs)
    assert v1_5.decode(inputs.input_ids[0]) == settings["text_out"]
    assert torch.equal(inputs.video_grid_thw, tensors[f"{case}.out.video_grid_thw"].long())
    assert torch.equal(inputs.num_frames, tensors[f"{case}.out.num_frames"].long())
    torch.testing.assert_close(
        inputs.pixel_values_videos, tensors[f"{case}.out.pixel_values_videos"], atol=PACKED_ATOL, rtol=0
    )
    assert "second_per_grid_ts" not in inputs


def test_runs_of_equal_frames_share_a_grid_row():
    frames = [torch.zeros(3, 40, 40, dtype=torch.uint8)] * 5
    types = [0, 1, 1, 0, 1]
    packed = pack_video(frames, PatchConfig(), slow_size=(112, 84), fast_size=(56, 56), frame_types=types)
    assert packed.grid_thw == [(1, 8, 6), (2, 4, 4), (1, 8, 6), (1, 4, 4)]
    equal = pack_video(frames, PatchConfig(), slow_size=(56, 56), fast_size=(56, 56), frame_types=types)
    assert equal.grid_thw == [(5, 4, 4)]
    assert equal.prompt.count("<|fast_start|>") == 3


def test_runs_never_cross_a_video_border_and_each_video_has_its_own_options(v1_5):
    videos = [torch.zeros(2, 3, 56, 56, dtype=torch.uint8), torch.zeros(3, 3, 56, 56, dtype=torch.uint8)]
    inputs = v1_5(
        text=[f"a{VIDEO}", f"b{VIDEO}"],
        videos=videos,
        height=[56, 56],
        width=[56, 56],
        fast_height=[28, 28],
        fast_width=[28, 28],
        frame_types=[[0, 1], [0, 0, 0]],
        timestamps=[[0.0, 0.5], None],
    )
    assert inputs.video_grid_thw.tolist() == [[1, 4, 4], [1, 2, 2], [3, 4, 4]]
    assert inputs.num_frames.tolist() == [2, 3]
    first, second = v1_5.batch_decode(inputs.input_ids)
    assert "<|frame|>0.5<|fast_start|><|video_pad|><|fast_end|>" in first
    assert second.count("<|frame|>" + "<|video_pad|>" * 4) == 3


def test_a_video_without_options_is_slow_and_sized_by_the_processor(v1_5):
    inputs = v1_5(text=VIDEO, videos=[torch.zeros(3, 3, 60, 90, dtype=torch.uint8)])
    assert inputs.video_grid_thw.tolist() == [[3, 4, 6]]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"frame_types": [[0, 1]]}, "frame_types must hold"),
        ({"frame_types": [[0, 1, 2]]}, "frame_types must hold"),
        ({"timestamps": [[0.0]]}, "timestamps must hold"),
        ({"height": [56, 56]}, "height must hold one entry for each of the 1 videos, got 2"),
        ({"height": [56]}, "height and width must be given together"),
        ({"height": [50], "width": [56]}, "multiples of 28, got 50x56"),
        ({"height": [0], "width": [56]}, "multiples of 28, got 0x56"),
    ],
)
def test_video_options_that_do_not_fit_are_refused(v1_5, kwargs, message):
    with pytest.raises(ValueError, match=message):
        v1_5(text=VIDEO, videos=[torch.zeros(3, 3, 56, 56, dtype=torch.uint8)], **kwargs)


# ---------------------------------------------------------------------------------------------------------- the rest


def test_the_byte_tokenizer_keeps_any_text_and_has_every_special_token():
    tokenizer = KeyeTokenizer(build_byte_tokenizer(["<extra>"]), eos_token="<|im_end|>")
    text = "Größe 图片 🙂\n\t \x00 'S  end" + "".join(chr(code) for code in range(32, 300))
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("".join(SPECIAL_TOKENS)) == list(range(256, 256 + len(SPECIAL_TOKENS)))
    assert len(tokenizer) == 256 + len(SPECIAL_TOKENS) + 1


def test_skip_special_tokens_keeps_the_thinking_tags(processor):
    ids = processor.tokenizer.encode("<think>a</think>b<|im_end|>")
    assert processor.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == "<think>a</think>b"
    assert processor.decode(torch.tensor(ids), skip_special_tokens=True) == "<think>a</think>b"
    assert processor.decode(ids[-1]) == "<|im_end|>"


def test_end_and_padding_tokens_are_read_by_name(processor):
    tokenizer = processor.tokenizer
    assert tokenizer.decode(tokenizer.eos_token_id) == "<|im_end|>"
    assert tokenizer.decode(tokenizer.pad_token_id) == "<|endoftext|>"


def test_batch_feature_moves_and_casts_only_floating_tensors(preview):
    inputs = preview(IMAGE, images=picture())
    assert inputs.to("cpu", torch.bfloat16) is inputs
    assert inputs.pixel_values.dtype == torch.bfloat16
    assert inputs.input_ids.dtype == torch.int64
    assert inputs.to(torch.float32).pixel_values.dtype == torch.float32
    assert inputs.to(device="meta").input_ids.device.type == "meta"
    with pytest.raises(AttributeError, match="no input named 'pixels'"):
        _ = inputs.pixels
    assert not hasattr(inputs, "pixel_values_videos")


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
def test_split_thinking_takes_answers_apart(text, expected):
    assert split_thinking(text) == expected
    assert split_thinking(text)._fields == ("analysis", "thought", "answer")


def test_split_thinking_never_shows_a_tag_while_streaming():
    text = "<analysis>a</analysis><think>t</think><answer>42</answer>"
    for end in range(len(text) + 1):
        parts = split_thinking(text[:end])
        assert not any(set("<>/") & set(part) for part in parts), (text[:end], parts)
        assert all(full.startswith(part) for full, part in zip(("a", "t", "42"), parts, strict=True))


def test_an_unknown_model_type_lists_the_known_ones(tmp_path):
    folder = write_processor_files(tmp_path, "preview")
    (folder / "config.json").write_text('{"model_type": "qwen2_vl"}')
    with pytest.raises(ValueError, match="model_type must be one of Keye, KeyeVL1_5, got 'qwen2_vl'"):
        KeyeProcessor.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer.json"])
def test_a_missing_or_damaged_file_is_named(tmp_path, name):
    folder = write_processor_files(tmp_path, "preview")
    (folder / name).write_text("{")
    with pytest.raises(ValueError, match=name):
        KeyeProcessor.from_pretrained(folder)
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        KeyeProcessor.from_pretrained(folder)


def test_a_path_that_is_no_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        KeyeProcessor.from_pretrained(tmp_path / "nowhere")


def test_a_tokenizer_without_the_placeholders_is_refused(tmp_path):
    folder = write_processor_files(tmp_path, "preview")
    content = (folder / "tokenizer.json").read_text().replace("<|image_pad|>", "<|other|>")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"no token '<\|image_pad\|>'"):
        KeyeProcessor.from_pretrained(folder)


def test_importing_the_package_loads_no_optional_library():
    code = (
        "import sys, keye_kernels.processing; "
        "print([m for m in ('PIL', 'jinja2', 'tokenizers', 'av', 'transformers', 'triton') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
