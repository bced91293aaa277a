"""Inputs that must raise an error, because the processor would otherwise build wrong inputs from them without a message."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from keye_kernels.editions import EDITIONS
from keye_kernels.processing import KeyeProcessor, process_vision_info
from keye_kernels.processing.images import load_image
from tests.helpers.messages import IMAGE, VIDEO, random_image, text_part, user
from tests.helpers.small_tokenizer import write_processor_files

FRAMES = torch.zeros(3, 3, 56, 56, dtype=torch.uint8)


def other(edition):
    return next(name for name in EDITIONS if name != edition)


@pytest.mark.parametrize("as_list", [True, False], ids=["list", "one-item"])
@pytest.mark.parametrize("video", [[random_image()] * 4, FRAMES], ids=["images", "tensor"])
def test_vision_info_of_the_other_edition_is_rejected(processor, video, as_list):
    messages = user({"type": "image", "image": random_image()}, {"type": "video", "video": video})
    wrong = other(processor.edition)
    images, videos, kwargs = process_vision_info(messages, True, edition=wrong)
    images, videos = (images, videos) if as_list else (images[0], [videos[0]])
    message = rf"edition={wrong!r}.*edition={processor.edition!r}"
    with pytest.raises(ValueError, match="images.*" + message):
        processor(IMAGE, images=images)
    for video_kwargs in ({}, kwargs):
        with pytest.raises(ValueError, match="videos.*" + message):
            processor(VIDEO, videos=videos, **video_kwargs)


def test_vision_info_of_1_5_needs_its_keyword_arguments(v1_5):
    _, videos, kwargs = process_vision_info(user({"type": "video", "video": [random_image()] * 4}), edition="1.5")
    with pytest.raises(ValueError, match=r"keyword arguments.*frame_types"):
        v1_5(VIDEO, videos=videos)
    assert v1_5(VIDEO, videos=videos, **kwargs)["num_frames"].tolist() == [4]


@pytest.mark.parametrize("text", [b"abc", ["abc"], {"a": 1}, 3, None])
def test_text_that_is_not_a_string_is_rejected(processor, text):
    with pytest.raises(TypeError, match=f"text of a part must be a string, got {type(text).__name__}"):
        processor.apply_chat_template(user(text_part("x"), {"type": "text", "text": text}))


@pytest.mark.parametrize("role", [b"user", None, 3])
def test_a_role_that_is_not_a_string_is_rejected(processor, role):
    with pytest.raises(TypeError, match=f"role must be a string, got {type(role).__name__}"):
        processor.apply_chat_template([{"role": role, "content": "x"}])


def test_text_that_utf_8_cannot_encode_is_rejected(processor):
    with pytest.raises(ValueError, match=r"text\[0\] has a character that UTF-8 cannot encode"):
        processor("a\ud800")


@pytest.mark.parametrize("name", ["add_generaton_prompt", "max_length", "documents", "range", "messages"])
def test_unknown_template_variables_are_rejected(processor, name):
    with pytest.raises(TypeError, match=name):
        processor.apply_chat_template([{"role": "user", "content": "x"}], **{name: [1]})


def test_variables_of_the_template_are_keyword_arguments(processor):
    turns = [{"role": "user", "content": "x"}]
    template = "{{ style }}{% for tool in tools or [] %}{{ tool.name }}{% endfor %}"
    assert processor.apply_chat_template(turns, chat_template=template, style="short") == "short"
    tools = [{"name": "search"}]
    assert processor.apply_chat_template(turns, chat_template=template, tools=tools) == "search"
    with pytest.raises(TypeError, match="tools must be a list of dictionaries"):
        processor.apply_chat_template(turns, chat_template=template, tools=[print])
    with pytest.raises(ValueError, match="the chat template does not use tools"):
        processor.apply_chat_template(turns, tools=tools)
    assert processor.apply_chat_template(turns, tools=None) == processor.apply_chat_template(turns)


@pytest.mark.parametrize("ending", ["It is", "im_end", "user", "It is "])
def test_continue_final_message_ends_with_the_last_text(processor, ending):
    messages = [*user(text_part("x")), {"role": "assistant", "content": ending}]
    start = processor.apply_chat_template(messages[:1])
    assert processor.apply_chat_template(messages, continue_final_message=True) == start + ending.rstrip()
    messages[1]["content"] = [text_part(ending)]
    assert processor.apply_chat_template([messages], continue_final_message=True) == [start + ending.rstrip()]
    assert messages[1]["content"] == [text_part(ending)]


def test_continue_final_message_needs_a_final_text(processor):
    with pytest.raises(ValueError, match="continue_final_message needs a last message"):
        processor.apply_chat_template(user({"type": "image", "image": random_image()}), continue_final_message=True)
    with pytest.raises(ValueError, match="continue_final_message needs a last message"):
        processor.apply_chat_template(user(text_part("x")), chat_template="fixed", continue_final_message=True)


def test_arguments_of_tokenize(processor):
    messages = user(text_part("Hi"))
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert torch.equal(processor.apply_chat_template(messages, tokenize=True, return_dict=False), inputs["input_ids"])
    with pytest.raises(ValueError, match="return_tensors must be 'pt', got 'np'"):
        processor.apply_chat_template(messages, tokenize=True, return_tensors="np")
    batch = [messages, user(text_part("longer"))]
    options = {"padding_side": "right"}
    assert processor.apply_chat_template(batch, tokenize=True, processor_kwargs=options)["attention_mask"][0, -1] == 0


GRAY_16 = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)


@pytest.mark.parametrize("image_format", [None, "PNG", "TIFF", "PPM"])
def test_16_bit_gray_is_scaled_to_8_bits(image_format):
    image = Image.fromarray(GRAY_16)
    if image_format:
        buffer = io.BytesIO()
        image.save(buffer, image_format)
        image = buffer.getvalue()
    expected = np.repeat((GRAY_16 // 257).astype(np.uint8)[..., None], 3, axis=-1)
    np.testing.assert_array_equal(np.asarray(load_image(image)), expected)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
@pytest.mark.parametrize("largest", [1, 255, 1e6])
def test_images_without_a_defined_range_are_rejected(dtype, largest):
    image = Image.fromarray(np.linspace(0, largest, 64).astype(dtype).reshape(8, 8))
    with pytest.raises(ValueError, match=f"mode {image.mode}.*8 bits"):
        load_image(image)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.ones(3, 56, 56), "multiply them by 255"),
        (torch.ones(3, 56, 56, dtype=torch.bool), "bool"),
        (torch.ones(3, 56, 56, dtype=torch.complex64), "complex64"),
        (torch.full((3, 56, 56), float("nan")), "from 0 to 255"),
        (torch.full((3, 56, 56), 300, dtype=torch.uint16), "from 0 to 255"),
    ],
    ids=["float ones", "bool", "complex", "nan", "uint16"],
)
def test_tensors_that_are_not_8_bit_values_are_rejected(processor, pixels, message):
    with pytest.raises((TypeError, ValueError), match=message):
        processor(IMAGE, images=pixels)
    with pytest.raises((TypeError, ValueError), match=message):
        processor(VIDEO, videos=[pixels[None]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({name: False}, f"{name}.*must be true") for name in ("do_resize", "do_rescale", "do_normalize")),
        ({"min_pixels": 100352, "max_pixels": 50176}, "min_pixels=100352.*max_pixels=50176"),
        *(({name: 0}, name) for name in ("min_pixels", "max_pixels", "patch_size", "merge_size", "rescale_factor")),
        *(({name: "many"}, name) for name in ("min_pixels", "patch_size", "resample", "rescale_factor", "image_mean")),
        *(({"patch_size": value}, "patch_size") for value in (14.5, float("nan"), float("inf"), True)),
        ({"resample": 9}, "resample"),
        ({"size": 3}, "size"),
        ({"image_std": [0, 0, 0]}, "image_std"),
        ({"image_std": 0.5}, "image_std"),
        ({"image_mean": [0.5, "x", 0.5]}, "image_mean"),
        ({"image_mean": [0.5, float("nan"), 0.5]}, "image_mean"),
    ],
    ids=str,
)
def test_senseless_settings_of_the_image_processor_are_rejected(tmp_path, settings, message):
    folder = write_processor_files(tmp_path, "preview", **settings)
    with pytest.raises(ValueError, match=message):
        KeyeProcessor.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["[]", "null", "3", "[" * 100_000])
def test_files_that_hold_no_json_object_are_named(tmp_path, name, content):
    folder = write_processor_files(tmp_path, "preview")
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        KeyeProcessor.from_pretrained(folder)


def test_from_pretrained_rejects_max_pixels_below_min_pixels(tmp_path):
    folder = write_processor_files(tmp_path, "preview", min_pixels=100352)
    with pytest.raises(ValueError, match=r"min_pixels=100352.*max_pixels=50176"):
        KeyeProcessor.from_pretrained(folder, max_pixels=50176)


@pytest.mark.parametrize("edition", EDITIONS)
@pytest.mark.parametrize("part", [{"image": random_image()}, {"video": [random_image()] * 2}], ids=["image", "video"])
def test_parts_with_min_pixels_above_max_pixels_are_rejected(edition, part):
    with pytest.raises(ValueError, match=r"min_pixels=100352.*max_pixels=50176"):
        process_vision_info(user({**part, "min_pixels": 100352, "max_pixels": 50176}), edition=edition)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5])
def test_timestamps_that_are_not_times_are_rejected(v1_5, value):
    with pytest.raises(ValueError, match="timestamps must be finite and not negative"):
        v1_5(VIDEO, videos=[FRAMES], timestamps=[[0.0, value, 1.0]])


@pytest.mark.parametrize(
    "kwargs",
    [
        {"frame_types": [[0, 0.5, 1]]},
        {"frame_types": [[0, float("nan"), 1]]},
        {"height": [56.5], "width": [56]},
        {"height": [float("nan")], "width": [56]},
        {"height": [], "width": []},
    ],
    ids=str,
)
def test_video_options_that_are_not_integers_are_rejected(v1_5, kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        v1_5(VIDEO, videos=[FRAMES], **kwargs)


@pytest.mark.parametrize("fps", [1e-45, "2", True, [], [[1.0]]])
def test_an_fps_that_is_not_a_frame_rate_is_rejected(preview, fps):
    with pytest.raises((TypeError, ValueError), match="fps"):
        preview(VIDEO, videos=[FRAMES], fps=fps)
