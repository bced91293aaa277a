"""Which frames of a video are sampled, and their sizes, for both editions."""

import base64
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from keye_kernels.editions import EDITIONS
from keye_kernels.processing import frame_buffer, process_vision_info
from keye_kernels.processing.sampling import preview_frame_count, preview_frame_size, slow_fast_sizes
from keye_kernels.processing.videos import fetch_video
from tests.helpers.messages import VIDEO, user_videos
from tests.helpers.video_clips import decode_clip, encode_clip


@pytest.fixture(scope="module")
def clip():
    return encode_clip(60, fps=10)


def test_every_source_gives_the_same_video(tmp_path, clip):
    path = tmp_path / "with space.mp4"
    path.write_bytes(clip)
    data = "data:video/mp4;base64," + base64.b64encode(clip).decode()
    expected = fetch_video({"video": clip}).frames
    for source in (path, str(path), f"file://{path}", data, bytearray(clip)):
        assert torch.equal(fetch_video({"video": source}).frames, expected)


@pytest.mark.parametrize("edition", EDITIONS)
def test_every_form_of_a_list_of_images_gives_the_same_video(edition):
    arrays = np.random.default_rng(0).integers(0, 256, (4, 40, 60, 3), dtype=np.uint8)
    images = [Image.fromarray(array) for array in arrays]
    encoded = []
    for image in images:
        image.save(file := io.BytesIO(), "PNG")
        encoded.append(file.getvalue())
    data = "data:video/png;base64," + ",".join(base64.b64encode(content).decode() for content in encoded)
    tensor = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    expected = fetch_video({"video": images}, edition=edition)
    forms = [arrays, tensor, tensor.float(), list(tensor), encoded, data, [{"image": image} for image in images]]
    for form in forms:
        frames = fetch_video({"video": form}, edition=edition).frames
        for frame, other in zip(frames, expected.frames, strict=True):
            np.testing.assert_array_equal(np.asarray(frame), np.asarray(other))


@pytest.mark.parametrize(
    ("options", "total", "fps", "expected"),
    [
        ({}, 300, 30.0, 20),
        ({}, 301, 29.97, 20),
        ({}, 30, 30.0, 4),
        ({}, 3, 30.0, 2),
        ({}, 100_000, 25.0, 768),
        ({"fps": 1.0}, 300, 30.0, 10),
        ({"fps": 60}, 301, 30.0, 300),
        ({"nframes": 7}, 300, 30.0, 8),
        ({"nframes": 5}, 300, 30.0, 4),
        ({"min_frames": 21}, 300, 30.0, 22),
        ({"max_frames": 9}, 300, 30.0, 8),
    ],
)
def test_preview_frame_counts(options, total, fps, expected):
    assert preview_frame_count(options, total, fps) == expected


@pytest.mark.parametrize(
    ("options", "count", "expected"),
    [
        ({}, 20, (560, 1008)),
        ({}, 768, (336, 644)),
        ({"max_pixels": 100352}, 20, (224, 420)),
        ({"min_pixels": 400_000, "total_pixels": 784}, 20, (476, 840)),
        ({"resized_height": 280, "resized_width": 300}, 20, (280, 308)),
    ],
)
def test_preview_frame_sizes(options, count, expected):
    assert preview_frame_size(options, count, 720, 1280) == expected


def test_video_max_pixels_sets_the_default_of_total_pixels(monkeypatch):
    monkeypatch.setenv("VIDEO_MAX_PIXELS", "3136000")
    small = preview_frame_size({}, 40, 720, 1280)
    assert math.prod(small) <= 3136000 / 40 * 2
    assert preview_frame_size({"total_pixels": 10**9}, 40, 720, 1280) == (560, 1008)


def test_preview_resizes_frames_bicubically(clip):
    images, videos, kwargs = process_vision_info(user_videos({"video": clip, "nframes": 6, "max_pixels": 50176}), True)
    assert images is None
    assert kwargs == {"fps": [1.0]}
    indices = torch.linspace(0, 59, 6).round().long().tolist()
    direct = torch.from_numpy(np.stack([decode_clip(clip)[index] for index in indices])).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(direct.float(), videos[0].shape[-2:], mode="bicubic", antialias=True)
    assert torch.equal(videos[0], expected.clamp(0, 255).round().to(torch.uint8))


@pytest.mark.parametrize("edition", EDITIONS)
def test_video_start_and_video_end_select_the_frames(edition, clip):
    # At 10 frames per second, 1.05 s to 3.0 s are frames 11 to 30.
    sampled = fetch_video({"video": clip, "video_start": 1.05, "video_end": 3.0}, edition=edition)
    indices = torch.linspace(11, 30, 4).round().long()
    torch.testing.assert_close(sampled.seconds, indices / 10)
    open_end = fetch_video({"video": clip, "video_start": 4.0, "video_end": 1e9}, edition=edition)
    assert open_end.seconds[0] == 4.0
    assert open_end.seconds[-1] == pytest.approx(5.9)


def test_resized_and_original_frames_give_the_same_inputs(processors):
    clip = encode_clip(40, fps=5, height=240, width=320)
    message = user_videos({"video": clip, "max_pixels": 60_000})
    _, lean, kwargs = process_vision_info(message, edition="1.5")
    _, original, same_kwargs = process_vision_info(message, edition="1.5", original_size=True)
    assert original[0].shape == (16, 3, 240, 320)
    assert isinstance(lean[0], list)
    assert {tuple(frame.shape[1:]) for frame in lean[0]} == {(196, 280), (168, 224)}
    assert kwargs["frame_types"][0].tolist() == same_kwargs["frame_types"][0].tolist()
    assert 0 < kwargs["frame_types"][0].sum() < 16
    a, b = (processors["1.5"](VIDEO, videos=videos, **kwargs) for videos in (lean, original))
    assert all(torch.equal(a[name], b[name]) for name in b)
    slow, fast = slow_fast_sizes({"max_pixels": 60_000}, 240, 320, 1, 15)
    assert (kwargs["height"], kwargs["width"]) == ([slow[0]], [slow[1]])
    assert (kwargs["fast_height"], kwargs["fast_width"]) == ([fast[0]], [fast[1]])


@pytest.mark.parametrize("limit", [0, 400_000, 10**9], ids=["none-buffered", "some-buffered", "all-buffered"])
def test_resizing_does_not_depend_on_how_many_frames_are_buffered(monkeypatch, limit):
    # With this pixel budget, the sizes depend on the number of slow frames.
    options = {"video": encode_clip(40, fps=5, height=240, width=320), "video_total_pixels": 16 * 50_000}
    expected = fetch_video(options, edition="1.5", original_size=True)
    monkeypatch.setattr(frame_buffer, "MAX_PENDING_BYTES", limit)
    sampled = fetch_video(options, edition="1.5")
    assert (sampled.slow_size, sampled.fast_size) == (expected.slow_size, expected.fast_size)
    sizes = [(sampled.slow_size, sampled.fast_size)[kind] for kind in expected.frame_types]
    for frame, original, size in zip(sampled.frames, expected.frames, sizes, strict=True):
        assert frame.nbytes <= original.nbytes
        resized = [
            torch.nn.functional.interpolate(image[None], size, mode="bilinear", antialias=True) for image in (frame, original)
        ]
        assert torch.equal(*resized)
    assert len({frame.shape for frame in sampled.frames}) == 2


def test_images_of_different_sizes_are_rejected():
    images = [Image.new("RGB", (64, 64)), Image.new("RGB", (64, 200))]
    with pytest.raises(ValueError, match="must have one size"):
        fetch_video({"video": images}, edition="1.5")
