"""The processor with text and images: inputs, padding, arguments, and the files of a checkpoint."""

import subprocess
import sys

import pytest
import torch
from PIL import Image

from keye_kernels.processing import KeyeProcessor, process_vision_info
from tests.helpers.golden import load_golden
from tests.helpers.messages import IMAGE, VIDEO, random_image, text_part, user
from tests.helpers.small_tokenizer import write_processor_files

# The golden pixels are float32; x * (1 / 255) and x / 255 differ by one rounding.
PIXEL_ATOL = 1e-6


def test_official_calls_give_the_models_inputs(processor):
    messages = user(
        {"type": "image", "image": random_image(56, 84)},
        {"type": "image", "image": random_image(61, 40, 1)},
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
    images = [random_image(56, 56), random_image(56, 84, 1), random_image(84, 84, 2)]
    inputs = processor(text=prompts, images=images)
    alone = [processor(prompts[0], images=images[0]), processor(prompts[1]), processor(prompts[2], images=images[1:])]
    length = inputs.input_ids.shape[1]
    for row, single in enumerate(alone):
        start = length - single.input_ids.shape[1]
        assert torch.equal(inputs.input_ids[row, start:], single.input_ids[0])
        assert inputs.attention_mask[row].tolist() == [0] * start + [1] * (length - start)
        assert (inputs.input_ids[row, :start] == processor.tokenizer.pad_token_id).all()
    assert torch.equal(inputs.pixel_values, torch.cat([alone[0].pixel_values, alone[2].pixel_values]))


def test_padding_on_the_right(processors):
    inputs = processors["1.5"](["a", "abc"], padding_side="right")
    assert inputs.attention_mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    with pytest.raises(ValueError, match="padding_side"):
        processors["1.5"]("a", padding_side="top")


def test_images_may_be_nested_by_prompt(processor):
    images = [random_image(seed=index) for index in range(2)]
    nested = processor([f"{IMAGE}a", f"{IMAGE}a"], images=[[images[0]], [images[1]]])
    assert torch.equal(nested.pixel_values, processor([f"{IMAGE}a"] * 2, images=images).pixel_values)


@pytest.mark.parametrize(("placeholders", "given"), [(1, 0), (0, 1), (2, 1), (1, 2)])
def test_a_wrong_number_of_images_names_both_counts(processor, placeholders, given):
    with pytest.raises(ValueError, match=rf"text holds {placeholders} image placeholders .* but {given} images"):
        processor(text="x" + IMAGE * placeholders, images=[random_image()] * given)


@pytest.mark.parametrize(("placeholders", "given"), [(1, 0), (0, 1), (2, 1)])
def test_a_wrong_number_of_videos_names_both_counts(processor, placeholders, given):
    videos = [torch.zeros(2, 3, 56, 56, dtype=torch.uint8)] * given
    with pytest.raises(ValueError, match=rf"text holds {placeholders} video placeholders .* but {given} videos"):
        processor(text="x" + VIDEO * placeholders, videos=videos)


@pytest.mark.parametrize("text", ["", "  \n", ["a", ""]])
def test_an_empty_prompt_is_rejected(processor, text):
    with pytest.raises(ValueError, match=r"text\[\d\] is empty"):
        processor(text=text)


def test_wrong_arguments_are_rejected(processor):
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
    assert limited(IMAGE, images=random_image(560, 560)).image_grid_thw.tolist() == [[1, 4, 4]]
    assert KeyeProcessor.from_pretrained(folder)(IMAGE, images=random_image(560, 560)).image_grid_thw.tolist() == [[1, 40, 40]]


def test_a_side_that_max_pixels_shrinks_to_zero_is_rejected(tmp_path):
    folder = write_processor_files(tmp_path, "preview", max_pixels=100352)
    with pytest.raises(ValueError, match="max_pixels=100352"):
        KeyeProcessor.from_pretrained(folder)(IMAGE, images=Image.new("RGB", (1999, 10)))


def test_chat_template_with_tokenize_loads_the_images(processor):
    messages = user({"type": "image", "image": random_image()}, text_part("Hi"))
    inputs = processor.apply_chat_template(messages, tokenize=True)
    expected = processor(processor.apply_chat_template(messages), images=random_image())
    assert set(inputs) == set(expected)
    assert all(torch.equal(inputs[name], expected[name]) for name in inputs)


def test_batch_feature_moves_and_casts_only_floating_tensors(preview):
    inputs = preview(IMAGE, images=random_image())
    assert inputs.to("cpu", torch.bfloat16) is inputs
    assert inputs.pixel_values.dtype == torch.bfloat16
    assert inputs.input_ids.dtype == torch.int64
    assert inputs.to(torch.float32).pixel_values.dtype == torch.float32
    assert inputs.to(device="meta").input_ids.device.type == "meta"
    with pytest.raises(AttributeError, match="no input named 'pixels'"):
        _ = inputs.pixels
    assert not hasattr(inputs, "pixel_values_videos")


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


def test_a_path_that_is_not_a_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        KeyeProcessor.from_pretrained(tmp_path / "nowhere")


def test_a_tokenizer_without_the_placeholders_is_rejected(tmp_path):
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
