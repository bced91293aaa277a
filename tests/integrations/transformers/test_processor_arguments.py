"""Arguments of AutoProcessor and AutoImageProcessor: supported ones have an effect, others raise an error that names them."""

import json
import shutil

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

import keye_kernels as kk
from keye_kernels.small import SMALL

HELLO = [{"role": "user", "content": "hello"}]


def get_weather(city: str) -> str:
    """
    Returns the weather.

    Args:
        city: name of the city
    """
    return city


@pytest.mark.parametrize("name", ["add_generaton_prompt", "documents", "return_assistant_tokens_mask", "enable_thinking"])
def test_unknown_template_arguments_are_rejected(small, name):
    with pytest.raises(TypeError, match=name):
        small[1].apply_chat_template(HELLO, **{name: True})


def test_default_values_of_transformers_arguments_are_accepted(small):
    defaults = {"tools": None, "documents": None, "return_assistant_tokens_mask": False, "load_audio_from_video": False}
    assert small[1].apply_chat_template(HELLO, **defaults) == small[1].apply_chat_template(HELLO)
    options = {"tokenize": True, "truncation": False, "max_length": None, "return_tensors": "pt"}
    assert set(small[1].apply_chat_template(HELLO, **options)) == {"input_ids", "attention_mask"}
    with pytest.raises(ValueError, match="truncation must be False"):
        small[1].apply_chat_template(HELLO, tokenize=True, truncation=True)


def test_tools_and_variables_reach_the_template(small):
    template = "{{ tools[0].function.name if tools }}{{ style }}"
    assert small[1].apply_chat_template(HELLO, chat_template=template, tools=[get_weather]) == "get_weather"
    assert small[1].apply_chat_template(HELLO, chat_template=template, style="short") == "short"
    with pytest.raises(ValueError, match="does not use tools"):
        small[1].apply_chat_template(HELLO, tools=[get_weather])


def test_continue_final_message_ignores_the_same_text_in_the_template(small):
    messages = [*HELLO, {"role": "assistant", "content": [{"type": "text", "text": "im_end"}]}]
    prompt = small[1].apply_chat_template(messages, continue_final_message=True)
    assert prompt.endswith("<|im_start|>assistant\nim_end")


@pytest.mark.parametrize("name", ["do_resize", "do_rescale", "do_normalize"])
def test_steps_of_the_image_processor_cannot_be_turned_off(small, name, tmp_path):
    image = Image.new("RGB", (56, 56))
    for call in (small[1].image_processor, lambda image, **options: small[1](text="<|image_pad|>", images=image, **options)):
        with pytest.raises(ValueError, match=f"{name}.*must be true"):
            call(image, **{name: False})
        assert torch.equal(call(image, **{name: True})["pixel_values"], call(image)["pixel_values"])
    changed = AutoProcessor.from_pretrained(SMALL)
    setattr(changed.image_processor, name, False)
    with pytest.raises(ValueError, match=f"{name}.*must be true"):
        changed.image_processor(image)
    for file in SMALL.glob("*.json"):
        shutil.copy(file, tmp_path)
    config = json.loads((tmp_path / "preprocessor_config.json").read_text()) | {name: False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{name}.*must be true"):
        AutoProcessor.from_pretrained(tmp_path)


def test_direct_arguments_come_before_groups(small):
    image = Image.new("RGB", (224, 224))
    one, other = {"max_pixels": 16 * 784}, {"max_pixels": 36 * 784}
    grids = [
        small[1](text="<|image_pad|>", images=image, **options)["image_grid_thw"].tolist()
        for options in ({"images_kwargs": other, **one}, one, other)
    ]
    assert grids[0] == grids[1] != grids[2]


def test_arguments_of_the_call_come_before_those_of_the_conversation(small):
    frames = [Image.new("RGB", (56, 56), (value, 0, 0)) for value in (0, 80, 160, 240)]
    messages = [{"role": "user", "content": [{"type": "video", "video": frames, "fps": 2.0}]}]
    for options, seconds in (({}, 0.5), ({"fps": 4.0}, 0.25)):
        inputs = small[1].apply_chat_template(messages, tokenize=True, **options)
        assert inputs["second_per_grid_ts"].tolist() == [seconds]


def test_unknown_arguments_of_the_image_processor_are_rejected(small):
    with pytest.raises(TypeError, match="max_pixel'"):
        small[1].image_processor(Image.new("RGB", (56, 56)), max_pixel=3136)


def test_max_pixels_below_min_pixels_is_rejected(small):
    with pytest.raises(ValueError, match=r"min_pixels=12544.*max_pixels=3136"):
        small[1](text="<|image_pad|>", images=Image.new("RGB", (56, 56)), max_pixels=3136)


def test_images_of_the_other_edition_are_rejected(small):
    part = {"type": "image", "image": Image.new("RGBA", (56, 56))}
    images = kk.process_vision_info([{"role": "user", "content": [part]}], edition="1.5")[0]
    for call in (small[1].image_processor, lambda images: small[1](text="<|image_pad|>", images=images)):
        with pytest.raises(ValueError, match=r"edition='1\.5'.*edition='preview'"):
            call(images)
