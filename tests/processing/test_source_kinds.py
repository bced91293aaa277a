"""The forms in which users have images and videos, and parts of messages in OpenAI's form."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

import keye_kernels as kk
from keye_kernels.processing import sources
from keye_kernels.processing.images import load_image
from keye_kernels.processing.patches import to_frame_tensors
from keye_kernels.processing.videos import fetch_video
from keye_kernels.small import ASSETS
from tests.helpers.http_answers import answer

IMAGE, CLIP = ASSETS / "image.png", ASSETS / "clip.mp4"
RGB = np.array(Image.open(IMAGE).convert("RGB"))
GRAY = RGB[..., 0]


def as_base64(file):
    return base64.b64encode(file.read_bytes()).decode()


def wrapped_base64(file):
    text = as_base64(file)
    return "\n".join(text[i : i + 76] for i in range(0, len(text), 76))


def used_buffer(file):
    buffer = io.BytesIO(file.read_bytes())
    buffer.read()
    return buffer


FILE_KINDS = {
    "BytesIO at its end": used_buffer,
    "bytearray": lambda file: bytearray(file.read_bytes()),
    "memoryview": lambda file: memoryview(file.read_bytes()),
    "base64": as_base64,
    "base64 in lines": wrapped_base64,
    "upper-case data URL": lambda file: f"DATA:application/octet-stream;BASE64,{as_base64(file)}".replace("BASE64", "base64"),
    "upper-case file URL": lambda file: f"FILE://{file}",
    "file URL with a host": lambda file: f"file://localhost{file}",
}


@pytest.mark.parametrize("kind", FILE_KINDS)
def test_an_image_file_may_have_each_form(kind):
    np.testing.assert_array_equal(np.asarray(load_image(FILE_KINDS[kind](IMAGE))), RGB)


@pytest.mark.parametrize("kind", FILE_KINDS)
@pytest.mark.parametrize("key", ["video", "video_url"])
def test_a_video_file_may_have_each_form(kind, key):
    expected = fetch_video({"video": str(CLIP)}).frames
    source = FILE_KINDS[kind](CLIP)
    assert torch.equal(fetch_video({key: {"url": source} if key == "video_url" else source}).frames, expected)


@pytest.mark.parametrize(
    "image, expected",
    [
        (GRAY, GRAY[..., None].repeat(3, -1)),
        (GRAY[..., None], GRAY[..., None].repeat(3, -1)),
        (GRAY[None], GRAY[..., None].repeat(3, -1)),
        (torch.from_numpy(GRAY), GRAY[..., None].repeat(3, -1)),
        (RGB.transpose(2, 0, 1), RGB),
        (torch.from_numpy(RGB), RGB),
        (torch.from_numpy(RGB).permute(2, 0, 1), RGB),
        (torch.from_numpy(RGB).permute(2, 0, 1).float(), RGB),
        (torch.from_numpy(RGB[:3]), None),
        (RGB[:3], RGB[:3]),
    ],
)
def test_an_image_may_be_gray_and_have_channels_first(image, expected):
    if expected is None:  # [3, W, 3] of a tensor: channels first
        expected = RGB[:3].transpose(1, 2, 0)
    np.testing.assert_array_equal(np.asarray(load_image(image)), expected)


def test_the_frames_of_a_video_may_be_gray_and_have_channels_first():
    expected = torch.from_numpy(np.stack([RGB, RGB])).permute(0, 3, 1, 2)
    for video in (expected, expected.numpy(), torch.from_numpy(np.stack([RGB, RGB])), list(expected.numpy())):
        torch.testing.assert_close(torch.stack(to_frame_tensors(video, "preview")), expected)
    gray = torch.from_numpy(GRAY).expand(2, 3, *GRAY.shape)
    for video in ([GRAY, GRAY], [torch.from_numpy(GRAY)] * 2, np.stack([GRAY, GRAY])[:, None]):
        torch.testing.assert_close(torch.stack(to_frame_tensors(video, "preview")), gray)
    processor = kk.small_processor()
    inputs = processor(text="<|vision_start|><|video_pad|><|vision_end|>", videos=[GRAY, GRAY])
    assert inputs["video_grid_thw"].tolist()[0][0] == 2


def test_an_image_in_a_data_url_is_a_video_of_one_image():
    video = fetch_video({"video": f"data:video/jpeg;base64,{as_base64(IMAGE)}"})
    assert len(video.frames) == 2  # Preview repeats the last image of an odd number


def test_a_short_string_is_a_path_and_a_long_one_that_is_not_base64_too():
    for text in ("abcd", "photo/cat", "a" * (sources.MIN_BASE64_CHARACTERS - 4), "x" * 300 + ".png"):
        with pytest.raises((FileNotFoundError, ValueError), match="file"):
            load_image(text)
    with pytest.raises(ValueError, match="not in a format that Pillow can read"):
        load_image("a" * 2 * sources.MIN_BASE64_CHARACTERS)


def test_an_existing_file_takes_precedence_over_base64(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "a" * 2 * sources.MIN_BASE64_CHARACTERS
    (tmp_path / name).write_bytes(IMAGE.read_bytes())
    np.testing.assert_array_equal(np.asarray(load_image(name)), RGB)


def test_an_unknown_scheme_is_named():
    for url in ("ftp://host/a.png", "s3://bucket/a.mp4"):
        with pytest.raises(ValueError, match=f"URL of http, https, file or data, got {url[:2]}"):
            load_image(url)


def test_a_url_may_have_international_characters_and_spaces(server):
    server.routes["/%C3%BC%20%E6%BC%A2.png?q=%C3%A4&r=%20"] = answer(IMAGE.read_bytes())
    for url in ("/ü 漢.png?q=ä&r=%20", "/%C3%BC%20%E6%BC%A2.png?q=%C3%A4&r=%20"):
        np.testing.assert_array_equal(np.asarray(load_image(server.address.replace("http", "HTTP") + url)), RGB)


@pytest.mark.parametrize(
    "url, encoded",
    [
        ("http://bücher.example:80/ä?b=c#d", "http://xn--bcher-kva.example:80/%C3%A4?b=c#d"),
        ("https://user:p%40ss@host/a;b,c/(d)?e=f&g=%2F+h", "https://user:p%40ss@host/a;b,c/(d)?e=f&g=%2F+h"),
        ("http://[::1]:8/x\r\nHost: y", "http://[::1]:8/xHost:%20y"),
    ],
)
def test_urls_are_encoded_once(url, encoded):
    assert sources._encoded_url(url) == encoded


def test_the_parts_of_openai_messages():
    processor = kk.small_processor()

    def inputs(part):
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "what is in the picture?"}]}]
        return processor.apply_chat_template(messages, tokenize=True)

    for expected, part in (
        ({"type": "video", "video": str(CLIP)}, {"type": "video_url", "video_url": {"url": str(CLIP)}}),
        ({"type": "video", "video": str(CLIP)}, {"type": "video_url", "video_url": str(CLIP)}),
        ({"type": "image", "image": str(IMAGE)}, {"type": "image_url", "image_url": {"url": as_base64(IMAGE)}}),
    ):
        first, second = inputs(expected), inputs(part)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_processor_calls_process_vision_info_with_its_edition(tmp_path):
    messages = [{"role": "user", "content": [{"type": "video", "video": str(CLIP)}]}]
    processor = kk.small_processor()
    assert len(processor.process_vision_info(messages)) == 2
    images, videos, video_kwargs = processor.process_vision_info(messages, return_video_kwargs=True, workers=2)
    assert images is None and len(videos) == 1 and list(video_kwargs) == ["fps"]
    processor.edition = "1.5"
    assert "timestamps" in processor.process_vision_info(messages)[2]
