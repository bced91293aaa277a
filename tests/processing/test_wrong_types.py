"""Values of other types end in an error that names the argument or the file; tests/fuzz found them."""

import json

import pytest
import torch

from keye_kernels.processing import KeyeProcessor
from keye_kernels.processing.images import fetch_image
from keye_kernels.processing.prompts import render_chat_template
from keye_kernels.processing.resize import MAX_RESIZED_PIXELS
from keye_kernels.processing.videos import fetch_video
from tests.helpers.small_tokenizer import write_processor_files
from tests.helpers.video_clips import encode_clip

TURN = [{"role": "user", "content": "x"}]
VIDEO = torch.zeros(2, 3, 56, 56, dtype=torch.uint8)
PROMPT = "<|vision_start|><|video_pad|><|vision_end|>"


@pytest.mark.parametrize(
    "ids",
    [None, 1.5, "abc", b"a", ["a"], [None], [True], [[1]], object()],
    ids=lambda ids: type(ids).__name__ if type(ids) is object else repr(ids),
)
def test_token_ids_that_are_not_integers_are_rejected(preview, ids):
    with pytest.raises(TypeError, match="token_ids must be integers"):
        preview.decode(ids)


@pytest.mark.parametrize("token_id", [-1, 2**32])
def test_token_ids_out_of_range_are_rejected(preview, token_id):
    with pytest.raises(ValueError, match=f"token_ids must be from 0 to 4294967295, got {token_id}"):
        preview.decode([1, token_id])


def test_sequences_of_ids_must_be_iterable(preview):
    with pytest.raises(TypeError, match="sequences must be"):
        preview.batch_decode(None)


def test_ids_may_be_tensors_and_arrays(preview):
    ids = preview.tokenizer.encode("abc")
    tensor = torch.tensor(ids)
    assert {preview.decode(form) for form in (ids, tensor, tensor.numpy(), list(tensor), tuple(ids))} == {"abc"}


@pytest.mark.parametrize("options", [{"thinking": []}, {"thinking": {}}], ids=str)
def test_a_thinking_mode_of_another_type_is_rejected(options):
    with pytest.raises(ValueError, match="thinking must be one of"):
        render_chat_template("{{ messages }}", TURN, **options)


@pytest.mark.parametrize("template", [1, b"x", {"a": 1}])
def test_a_template_that_is_not_a_string_is_rejected(preview, template):
    with pytest.raises(TypeError, match="chat_template must be a string"):
        preview.apply_chat_template(TURN, chat_template=template)


@pytest.mark.parametrize("messages", [[1], ["x"], [None], [TURN, 1]], ids=repr)
def test_conversations_that_are_not_lists_are_rejected(preview, messages):
    with pytest.raises(TypeError, match="messages must hold turns or lists of turns"):
        preview.apply_chat_template(messages)


@pytest.mark.parametrize("options", [1, {1: 2}])
def test_processor_kwargs_must_be_a_dictionary(preview, options):
    with pytest.raises(TypeError, match="processor_kwargs must be a dictionary"):
        preview.apply_chat_template(TURN, tokenize=True, processor_kwargs=options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"timestamps": [True]}, TypeError, "timestamps of a video must be a list of numbers"),
        ({"timestamps": [["a", "b"]]}, TypeError, "timestamps of a video must be a list of numbers"),
        ({"frame_types": ["ab"]}, TypeError, "frame_types of a video must be a list of numbers"),
        ({"frame_types": [[None, 0]]}, TypeError, "frame_types of a video must be a list of numbers"),
        ({"frame_types": torch.zeros(1, 1, 2)}, ValueError, "frame_types must have at most 2 axes"),
        ({"height": torch.full((1, 1), 56), "width": [56]}, ValueError, "height must have at most 1 axes"),
        ({"height": ["56"], "width": [56]}, ValueError, "height must be an integer"),
    ],
    ids=str,
)
def test_arguments_of_videos_with_other_types_are_rejected(v1_5, options, error, message):
    with pytest.raises(error, match=message):
        v1_5(PROMPT, videos=[VIDEO], **options)


@pytest.mark.parametrize("name", ["resized_height", "min_pixels", "max_pixels"])
@pytest.mark.parametrize("value", [float("inf"), 1e-300, 0.5])
def test_sizes_below_one_pixel_or_infinite_are_rejected(name, value):
    from PIL import Image

    options = {"resized_width": value} if name == "resized_height" else {}
    for fetch, part in ((fetch_image, {"image": Image.new("RGB", (30, 30))}), (fetch_video, {"video": VIDEO})):
        with pytest.raises(ValueError, match=f"{name} must be a positive number of at least 1"):
            fetch({**part, name: value, **options})


def test_min_pixels_cannot_fill_the_memory(preview):
    from PIL import Image

    image = Image.new("RGB", (30, 30))
    with pytest.raises(ValueError, match=f"min_pixels must be at most {MAX_RESIZED_PIXELS}, got 1000000000000"):
        fetch_image({"image": image, "min_pixels": 10**12})


def test_a_video_with_an_unknown_codec_is_rejected():
    content = encode_clip(3, container="mp4")
    assert content.count(b"avc1") > 0
    with pytest.raises(ValueError, match="has a codec that FFmpeg does not know"):
        fetch_video({"video": content.replace(b"avc1", b"zzzz")})


@pytest.mark.parametrize("kind", [1, ["text"], torch.zeros(3)], ids=type)
def test_types_of_parts_that_are_not_strings_are_rejected(preview, kind):
    with pytest.raises(TypeError, match="type of a part must be a string"):
        preview.apply_chat_template([{"role": "user", "content": [{"type": kind, "text": "x"}]}])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", {}, r"config\.json: model_type must be one of"),
        ("preprocessor_config.json", {"patch_size": 1e300}, r"patch_size in preprocessor_config\.json must be from 1 to 256"),
        ("preprocessor_config.json", {"merge_size": 17}, r"merge_size in preprocessor_config\.json must be from 1 to 16"),
        ("chat_template.jinja", b"\xff", r"chat_template\.jinja is not UTF-8 text"),
        ("config.json", b"\xff", r"config\.json is not UTF-8 text"),
        ("tokenizer_config.json", {"eos_token": ["x"]}, r"eos_token in .*tokenizer_config\.json must be a token"),
        (
            "tokenizer_config.json",
            {"pad_token": {"content": 1}},
            r"pad_token in .*tokenizer_config\.json must be a token",
        ),
        ("tokenizer_config.json", {"pad_token": "\ud800"}, r"the tokenizer has no token '\\ud800'"),
        ("tokenizer_config.json", {"chat_template": [["x"]]}, r"tokenizer_config\.json: a list under 'chat_template'"),
        (
            "tokenizer_config.json",
            {"chat_template": [{"template": "x"}]},
            r"tokenizer_config\.json: a list under 'chat_template'",
        ),
    ],
    ids=str,
)
def test_damaged_files_are_named(tmp_path, file, content, message):
    folder = write_processor_files(tmp_path, "preview")
    for template in tmp_path.glob("chat_template.*"):
        template.unlink()
    (folder / file).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ValueError, match=message):
        KeyeProcessor.from_pretrained(folder)


def test_the_message_of_a_damaged_tokenizer_is_short(tmp_path):
    folder = write_processor_files(tmp_path, "preview")
    (folder / "tokenizer.json").write_text(json.dumps("x" * 10**5))
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read as a tokenizer") as error:
        KeyeProcessor.from_pretrained(folder)
    assert len(str(error.value)) < 1000
