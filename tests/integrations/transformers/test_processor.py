"""AutoProcessor returns the tensors of the lean processor and supports transformers' arguments."""

import base64
import io
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, pipeline
from transformers import BatchFeature as TransformersBatchFeature

import keye_kernels as kk
from keye_kernels.small import SMALL

IMAGE = SMALL.parent / "image.png"
GREEDY = {"do_sample": False, "max_new_tokens": 24}


def conversation(**source):
    return [{"role": "user", "content": [{"type": "image", **source}, {"type": "text", "text": "what is in the picture?"}]}]


@pytest.fixture(scope="module")
def v1_5_folder(tmp_path_factory):
    """The small checkpoint's processor files with the `model_type` of 1.5."""
    folder = tmp_path_factory.mktemp("small_1_5")
    for file in SMALL.glob("*.json"):
        shutil.copy(file, folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "KeyeVL1_5"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def lean_answer():
    """Tokens of the lean small model about the image, and the text of the new tokens."""
    inputs = kk.small_processor().apply_chat_template(conversation(image=Image.open(IMAGE)), tokenize=True)
    tokens = kk.small_model(dtype=torch.float32).generate(**inputs, max_new_tokens=24)
    text = kk.small_processor().decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert " at " in text
    return tokens, text


def assert_same(found, expected):
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_small_model_matches_the_lean_one(small):
    model, processor = small
    messages = conversation(image=Image.open(IMAGE))
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    assert isinstance(inputs, TransformersBatchFeature)
    tokens = model.generate(**inputs, **GREEDY)
    expected, text = lean_answer()
    assert torch.equal(tokens, expected)
    assert processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == [text]


def test_official_calls_give_the_same_tensors(small):
    processor = small[1]
    messages = [conversation(image=Image.open(IMAGE)), [{"role": "user", "content": "hello"}]]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images, videos = kk.process_vision_info(messages)
    inputs = processor(text=text, images=images, videos=videos, padding=True, return_tensors="pt")
    assert_same(inputs, kk.small_processor().apply_chat_template(messages, tokenize=True))
    assert inputs["attention_mask"][1, 0] == 0


@pytest.mark.parametrize("key", ["url", "path", "base64"])
def test_image_keys_of_transformers(small, key):
    value = base64.b64encode(IMAGE.read_bytes()).decode() if key == "base64" else str(IMAGE)
    template = {"tokenize": True, "return_dict": True}
    found = small[1].apply_chat_template(conversation(**{key: value}), **template)
    assert_same(found, small[1].apply_chat_template(conversation(image=Image.open(IMAGE)), **template))


def test_pixel_limits_are_set_when_loading_per_call_or_as_attribute(small):
    messages, limit = conversation(image=Image.open(IMAGE)), 16 * 784
    template = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    expected = kk.small_processor(max_pixels=limit).apply_chat_template(messages, tokenize=True)
    assert len(expected["pixel_values"]) < len(small[1].apply_chat_template(messages, **template)["pixel_values"])
    loaded = AutoProcessor.from_pretrained(SMALL, max_pixels=limit)
    assert loaded.image_processor.size == {"min_pixels": 12544, "max_pixels": limit}
    assert_same(loaded.apply_chat_template(messages, **template), expected)
    assert_same(small[1].apply_chat_template(messages, max_pixels=limit, **template), expected)
    changed = AutoProcessor.from_pretrained(SMALL)
    changed.image_processor.max_pixels = limit
    assert_same(changed.apply_chat_template(messages, **template), expected)


def test_padding_side():
    def side(processor, **options):
        mask = processor(text=["a", "a long text"], **options)["attention_mask"]
        return {(0, 1): "left", (1, 0): "right"}[tuple(mask[0, [0, -1]].tolist())]

    processor = AutoProcessor.from_pretrained(SMALL)
    assert side(processor) == "left" and side(processor, padding_side="right") == "right"
    processor.tokenizer.padding_side = "right"
    assert side(processor) == "right" and side(processor, padding_side="left") == "left"
    assert side(AutoProcessor.from_pretrained(SMALL, padding_side="right")) == "right"


def test_grouped_arguments(small):
    image, limit = Image.open(IMAGE), 16 * 784
    found = small[1](
        text=["<|image_pad|>", "two words"],
        images=[image],
        images_kwargs={"max_pixels": limit},
        text_kwargs={"padding_side": "right", "return_token_type_ids": False, "return_attention_mask": True},
        videos_kwargs={},
        common_kwargs={"return_tensors": "pt"},
    )
    flat = {"max_pixels": limit, "padding_side": "right"}
    assert_same(found, small[1](text=["<|image_pad|>", "two words"], images=[image], **flat))


def test_loading_rejects_unknown_arguments():
    with pytest.raises(TypeError, match=r"\['max_pixel'\].*'max_pixels'"):
        AutoProcessor.from_pretrained(SMALL, max_pixel=5)
    AutoProcessor.from_pretrained(SMALL, use_fast=True, trust_remote_code=False, revision="main", force_download=False)


@pytest.mark.parametrize("edition", ["preview", "1.5"])
def test_saved_processor_can_be_loaded(edition, v1_5_folder, tmp_path):
    folder = v1_5_folder if edition == "1.5" else SMALL
    AutoProcessor.from_pretrained(folder, max_pixels=15680).save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.edition == edition and again.image_processor.max_pixels == 15680
    assert again.chat_template == kk.small_processor().chat_template
    shutil.copy(folder / "config.json", tmp_path)
    lean = kk.KeyeProcessor.from_pretrained(tmp_path)
    assert lean.edition == edition and lean.patch_config == again.image_processor.patch_config()


def test_edition_is_read_from_the_configuration(v1_5_folder):
    processor = AutoProcessor.from_pretrained(v1_5_folder)
    assert json.loads((v1_5_folder / "preprocessor_config.json").read_text())["processor_class"] == "KeyeProcessor"
    assert type(processor).__name__ == "KeyeVL1_5Processor" and processor.edition == "1.5"
    assert (processor.frame_token, processor.fast_start, processor.fast_end) == (
        "<|frame|>",
        "<|fast_start|>",
        "<|fast_end|>",
    )


def test_slow_and_fast_frames(v1_5_folder):
    frames = torch.randint(0, 256, (3, 3, 84, 112), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    options = {
        **{"height": [84], "width": [112], "fast_height": [56], "fast_width": [56]},
        **{"timestamps": [[0.0, 0.5, 1.0]], "frame_types": [[0, 1, 0]]},
    }
    text = "<|vision_start|><|video_pad|><|vision_end|>what happens?"
    found = AutoProcessor.from_pretrained(v1_5_folder)(text=[text], videos=[frames], **options)
    assert_same(found, kk.KeyeProcessor.from_pretrained(v1_5_folder)(text, videos=[frames], **options))
    assert found["num_frames"].tolist() == [3] and found["video_grid_thw"].tolist() == [[1, 6, 8], [1, 4, 4], [1, 6, 8]]


def test_image_processor_alone(small):
    if transformers.__version__.startswith("4."):
        pytest.skip("transformers 4 uses its own class of the same name")
    alone = AutoImageProcessor.from_pretrained(SMALL)
    image = np.asarray(Image.open(IMAGE))
    expected = small[1](text="<|image_pad|>", images=[image])
    found = alone(image, return_tensors="pt")
    assert torch.equal(found["pixel_values"], expected["pixel_values"])
    assert torch.equal(found["image_grid_thw"], expected["image_grid_thw"])


@pytest.mark.parametrize("edition, gray", [("preview", 1.0), ("1.5", -1.0)])
def test_transparency_depends_on_the_edition(edition, gray, v1_5_folder):
    """A black, transparent image becomes white if it is blended and stays black if alpha is dropped."""
    processor = AutoProcessor.from_pretrained(v1_5_folder if edition == "1.5" else SMALL)
    pixels = processor(text="<|image_pad|>", images=[Image.new("RGBA", (56, 56))])["pixel_values"]
    assert (pixels == gray).all()


def test_continue_final_message(small):
    messages = [*conversation(image=Image.open(IMAGE)), {"role": "assistant", "content": "a large red "}]
    prompt = small[1].apply_chat_template(messages, continue_final_message=True)
    assert prompt.endswith("<|im_start|>assistant\na large red")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"truncation": True}, "truncation must be False"),
        ({"frame_types": [[0]]}, "unexpected keyword arguments"),
        ({"return_tensors": "np"}, "return_tensors must be 'pt'"),
    ],
    ids=["truncation", "other edition", "numpy"],
)
def test_unsupported_arguments_are_rejected(small, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        small[1](text="hello", **options)


def test_tokenizer_code_of_a_repository_is_not_run(tmp_path):
    for file in SMALL.glob("*.json"):
        shutil.copy(file, tmp_path)
    remote = {
        "tokenizer_class": "KeyeTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_keye.KeyeTokenizer", None]},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(remote))
    (tmp_path / "tokenization_keye.py").write_text("raise SystemExit('ran')")
    try:
        processor = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    except ValueError as error:
        assert "trust_remote_code" in str(error)
    else:
        assert type(processor.tokenizer).__module__.startswith("transformers.")


def test_pipeline_answers_a_question_about_an_image(small):
    model, processor = small
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    for messages in (conversation(image=Image.open(IMAGE)), conversation(url=str(IMAGE))):
        answer = pipe(text=messages, return_full_text=False, max_new_tokens=24)[0]["generated_text"]
        assert answer == lean_answer()[1]


def test_saved_model_and_processor_run_again(small, tmp_path):
    model, processor = small
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    messages = conversation(image=Image.open(io.BytesIO(IMAGE.read_bytes())))
    again = AutoModel.from_pretrained(tmp_path)
    inputs = AutoProcessor.from_pretrained(tmp_path).apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    lean = kk.Keye.from_pretrained(tmp_path).generate(
        **kk.KeyeProcessor.from_pretrained(tmp_path).apply_chat_template(messages, tokenize=True), max_new_tokens=24
    )
    assert torch.equal(again.generate(**inputs, **GREEDY), lean)


def test_loading_accepts_the_arguments_that_vllm_passes():
    request = {
        "frame_types": [torch.tensor([0, 1])],
        "timestamps": [torch.tensor([0.0, 0.5])],
        "height": [112],
        "fps": 2.0,
    }
    assert AutoProcessor.from_pretrained(SMALL, **request).image_processor.size
