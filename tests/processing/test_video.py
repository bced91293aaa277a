"""Real clips, encoded here, through both editions' rules."""

import base64
import io
import math
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from keye_kernels.processing import KeyeProcessor, frame_buffer, process_vision_info
from keye_kernels.processing.sampling import preview_frame_count, preview_frame_size, slow_fast_sizes
from keye_kernels.processing.video_reader import VideoReader
from keye_kernels.processing.videos import fetch_video, open_video
from tests.helpers.small_tokenizer import write_processor_files
from tests.helpers.video_clips import decode_clip, encode_clip

VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
EDITIONS = ["preview", "1.5"]

# (codec, container, options): with B frames, open groups of pictures, no clean entry points, invisible frames, no times.
FORMATS = {
    "h264": ("libx264", "mp4", {}),
    "h264-b-frames": ("libx264", "mp4", {"preset": "medium", "g": "12", "bf": "3"}),
    "h264-open-gop": ("libx264", "mkv", {"preset": "medium", "x264-params": "open-gop=1:keyint=10:bframes=4"}),
    "h264-intra-refresh": ("libx264", "mp4", {"x264-params": "intra-refresh=1:keyint=10"}),
    "h264-avi": ("libx264", "avi", {"preset": "medium"}),
    "h264-ts": ("libx264", "ts", {"preset": "medium"}),
    "h264-raw": ("libx264", "h264", {}),
    "hevc": ("libx265", "mp4", {}),
    "vp9": ("libvpx-vp9", "webm", {"g": "10"}),
    "mpeg4": ("mpeg4", "mp4", {"g": "8", "bf": "2"}),
}


def user(*parts):
    return [{"role": "user", "content": [{"type": "video", **part} for part in parts]}]


@pytest.fixture(scope="module")
def clip():
    return encode_clip(60, fps=10)


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    return {
        edition: KeyeProcessor.from_pretrained(write_processor_files(tmp_path_factory.mktemp("checkpoint"), edition))
        for edition in EDITIONS
    }


# ------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("name", FORMATS)
def test_chosen_frames_equal_those_of_a_full_decode(name):
    codec, container, options = FORMATS[name]
    content = encode_clip(40, fps=20, codec=codec, container=container, **options)
    expected = decode_clip(content)
    reader = VideoReader(io.BytesIO(content), name)
    assert len(reader.times) == len(expected) == 40
    for indices in ([0], [39], [11, 12, 13], [0, 25, 39], range(0, 40, 7), range(40)):
        frames = list(reader.frames(indices))
        for index, frame in zip(indices, frames, strict=True):
            np.testing.assert_array_equal(frame.to_rgb().permute(1, 2, 0), expected[index], err_msg=f"{index}")


@pytest.mark.parametrize("container", ["mp4", "mkv", "avi", "ts"])
@pytest.mark.parametrize("fps", [10, 30])
def test_times_of_constant_rate_files_equal_the_official_ones(container, fps):
    sampled = fetch_video({"video": encode_clip(3 * fps, fps=fps, container=container), "fps": 3}, edition="1.5")
    indices = torch.linspace(0, 3 * fps - 1, 9).round().long().tolist()
    assert sampled.seconds.tolist() == torch.tensor([(1 / fps) * index for index in indices]).tolist()


@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_times_of_variable_rate_files_come_from_the_stream(container):
    pts = [0, 40, 80, 500, 1000, 1040, 1500, 2000, 2500, 4000]
    clip = encode_clip(10, fps=10, pts=[1000 + time for time in pts], container=container)
    sampled = fetch_video({"video": clip, "fps": 20}, edition="1.5")
    with open_video(clip) as reader:
        assert not reader.is_constant_rate
        indices = torch.linspace(0, 9, len(sampled.seconds)).round().long().tolist()
    assert len(indices) >= 9
    torch.testing.assert_close(sampled.seconds, torch.tensor([pts[index] / 1000 for index in indices]))


@pytest.mark.parametrize("edition", EDITIONS)
@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation_metadata_is_honoured(edition, rotation):
    content = encode_clip(12, fps=4, rotation=rotation)
    turned = [np.rot90(frame, rotation / 90) for frame in decode_clip(encode_clip(12, fps=4))]
    sampled = fetch_video({"video": content}, edition=edition)
    if edition == "1.5":
        indices = torch.linspace(0, 11, 6).round().long().tolist()
        np.testing.assert_array_equal(sampled.frames.permute(0, 2, 3, 1), np.stack([turned[i] for i in indices]))
    height, width = sampled.frames.shape[-2:]
    assert (height > width) == (rotation != 180)


@pytest.mark.parametrize("edition", EDITIONS)
def test_odd_sizes_and_single_frames_are_read(edition):
    odd = encode_clip(8, fps=2, height=51, width=37, pix_fmt="yuv444p")
    frames = fetch_video({"video": odd}, edition=edition).frames
    if edition == "1.5":
        np.testing.assert_array_equal(frames.permute(0, 2, 3, 1), np.stack(decode_clip(odd)))
    sampled = fetch_video({"video": encode_clip(1)}, edition=edition)
    assert len(sampled.frames) == (2 if edition == "preview" else 1)
    assert sampled.seconds.tolist() == [0.0] * len(sampled.frames)
    assert all(torch.equal(frame, sampled.frames[0]) for frame in sampled.frames)


def test_a_clip_shorter_than_one_sample_gives_one_frame():
    sampled = fetch_video({"video": encode_clip(4, fps=10)}, edition="1.5")
    assert sampled.seconds.tolist() == [0.0]
    assert sampled.frame_types.tolist() == [0]


def test_every_source_gives_the_same_video(tmp_path, clip):
    path = tmp_path / "with space.mp4"
    path.write_bytes(clip)
    data = "data:video/mp4;base64," + base64.b64encode(clip).decode()
    expected = fetch_video({"video": clip}).frames
    for source in (path, str(path), f"file://{path}", data, bytearray(clip)):
        assert torch.equal(fetch_video({"video": source}).frames, expected)


@pytest.mark.parametrize("edition", EDITIONS)
def test_pictures_in_any_form_make_the_same_video(edition):
    arrays = np.random.default_rng(0).integers(0, 256, (4, 40, 60, 3), dtype=np.uint8)
    pictures = [Image.fromarray(array) for array in arrays]
    encoded = []
    for picture in pictures:
        picture.save(file := io.BytesIO(), "PNG")
        encoded.append(file.getvalue())
    data = "data:video/png;base64," + ",".join(base64.b64encode(content).decode() for content in encoded)
    tensor = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    expected = fetch_video({"video": pictures}, edition=edition)
    forms = [arrays, tensor, tensor.float(), list(tensor), encoded, data, [{"image": picture} for picture in pictures]]
    for form in forms:
        frames = fetch_video({"video": form}, edition=edition).frames
        for frame, other in zip(frames, expected.frames, strict=True):
            np.testing.assert_array_equal(np.asarray(frame), np.asarray(other))


def test_ten_minutes_take_the_memory_of_their_frames_only(tmp_path):
    path = tmp_path / "long.mp4"
    path.write_bytes(encode_clip(6000, fps=10, height=16, width=32, draw=_flat))
    tracemalloc.start()
    sampled = fetch_video({"video": str(path), "fps": 0.1, "max_pixels": 37632}, edition="1.5")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(sampled.frames) == 60
    assert sampled.seconds[-1] == pytest.approx(599.9)
    assert peak < 8 * 2**20


def _flat(index, height, width):
    return np.full((height, width, 3), index % 256, np.uint8)


# ------------------------------------------------------------------------------------------------------ Preview rules


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
def test_preview_frame_counts_follow_the_specification(options, total, fps, expected):
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
def test_preview_frame_sizes_follow_the_specification(options, count, expected):
    assert preview_frame_size(options, count, 720, 1280) == expected


def test_the_environment_variable_replaces_previews_total(monkeypatch):
    monkeypatch.setenv("VIDEO_MAX_PIXELS", "3136000")
    small = preview_frame_size({}, 40, 720, 1280)
    assert math.prod(small) <= 3136000 / 40 * 2
    assert preview_frame_size({"total_pixels": 10**9}, 40, 720, 1280) == (560, 1008)


def test_preview_reads_frames_resized_bicubically(clip):
    images, videos, kwargs = process_vision_info(user({"video": clip, "nframes": 6, "max_pixels": 50176}), True)
    assert images is None
    assert kwargs == {"fps": [1.0]}
    indices = torch.linspace(0, 59, 6).round().long().tolist()
    direct = torch.from_numpy(np.stack([decode_clip(clip)[index] for index in indices])).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(direct.float(), videos[0].shape[-2:], mode="bicubic", antialias=True)
    assert torch.equal(videos[0], expected.clamp(0, 255).round().to(torch.uint8))


@pytest.mark.parametrize("edition", EDITIONS)
def test_start_and_end_choose_the_frames(edition, clip):
    # 10 frames a second: 1.05 s to 3.0 s are frames 11 to 30.
    sampled = fetch_video({"video": clip, "video_start": 1.05, "video_end": 3.0}, edition=edition)
    indices = torch.linspace(11, 30, 4).round().long()
    torch.testing.assert_close(sampled.seconds, indices / 10)
    open_end = fetch_video({"video": clip, "video_start": 4.0, "video_end": 1e9}, edition=edition)
    assert open_end.seconds[0] == 4.0
    assert open_end.seconds[-1] == pytest.approx(5.9)


# ---------------------------------------------------------------------------------------------------------- 1.5 rules


def test_shrunk_frames_and_original_frames_give_the_same_inputs(processors):
    clip = encode_clip(40, fps=5, height=240, width=320)
    message = user({"video": clip, "max_pixels": 60_000})
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


@pytest.mark.parametrize("limit", [0, 400_000, 10**9], ids=["second-pass", "late-second-pass", "waiting"])
def test_frames_whose_size_is_known_late_are_the_same_by_each_way(monkeypatch, limit):
    # The budget makes the sizes depend on how many frames turn out slow.
    options = {"video": encode_clip(40, fps=5, height=240, width=320), "video_total_pixels": 16 * 50_000}
    expected = fetch_video(options, edition="1.5", original_size=True)
    monkeypatch.setattr(frame_buffer, "MAX_PENDING_BYTES", limit)
    sampled = fetch_video(options, edition="1.5")
    assert (sampled.slow_size, sampled.fast_size) == (expected.slow_size, expected.fast_size)
    sizes = [(sampled.slow_size, sampled.fast_size)[kind] for kind in expected.frame_types]
    for frame, original, size in zip(sampled.frames, expected.frames, sizes, strict=True):
        assert frame.nbytes <= original.nbytes
        resized = [
            torch.nn.functional.interpolate(image[None], size, mode="bilinear", antialias=True)
            for image in (frame, original)
        ]
        assert torch.equal(*resized)
    assert len({frame.shape for frame in sampled.frames}) == 2


def test_pictures_of_different_sizes_are_refused():
    pictures = [Image.new("RGB", (64, 64)), Image.new("RGB", (64, 200))]
    with pytest.raises(ValueError, match="must have one size"):
        fetch_video({"video": pictures}, edition="1.5")


def test_the_list_of_times_stays_aligned_where_a_video_has_none(processors):
    pictures = [Image.new("RGB", (60, 60), (index * 40, 0, 0)) for index in range(3)]
    message = user({"video": pictures}, {"video": pictures[:2], "fps": 4.0})
    _, videos, kwargs = process_vision_info(message, edition="1.5")
    assert kwargs["timestamps"][0] is None
    assert kwargs["timestamps"][1].tolist() == [0.0, 0.25]
    inputs = processors["1.5"](VIDEO * 2, videos=videos, **kwargs)
    assert inputs.num_frames.tolist() == [3, 2]
    # The official package leaves the None out; lengths tell where it belongs.
    official = {**kwargs, "timestamps": kwargs["timestamps"][1:]}
    assert torch.equal(processors["1.5"](VIDEO * 2, videos=videos, **official).input_ids, inputs.input_ids)
    same_length = [videos[0][:2], videos[1]]
    official["frame_types"] = [official["frame_types"][0][:2], official["frame_types"][1]]
    with pytest.raises(ValueError, match="timestamps must hold one entry"):
        processors["1.5"](VIDEO * 2, videos=same_length, **official)


# ------------------------------------------------------------------------------------------------------ the processor


@pytest.mark.parametrize("edition", EDITIONS)
def test_official_calls_take_a_clip_to_the_models_inputs(processors, clip, edition):
    processor = processors[edition]
    messages = [{"role": "user", "content": [{"type": "video", "video": clip}, {"type": "text", "text": "What?"}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images, videos, kwargs = process_vision_info(messages, return_video_kwargs=True, edition=edition)
    inputs = processor(text=text, images=images, videos=videos, padding=True, return_tensors="pt", **kwargs)
    grids = inputs.video_grid_thw
    assert len(inputs.pixel_values_videos) == grids.prod(1).sum()
    assert (inputs.input_ids == processor.video_token_id).sum() == grids.prod(1).sum() // 4
    if edition == "preview":
        torch.testing.assert_close(inputs.second_per_grid_ts, torch.tensor([0.5]))
        assert grids[:, 0].tolist() == [12]
    else:
        assert inputs.num_frames.tolist() == [12]
        assert "<|frame|>0.5<|fast_start|><|video_pad|>" in processor.decode(inputs.input_ids[0])
    again = processor.apply_chat_template(messages, tokenize=True)
    assert all(torch.equal(again[name], inputs[name]) for name in inputs)


def test_outputs_of_the_official_preview_package_are_taken(processors):
    # It returns float frames and a list of rates.
    frames = torch.randint(0, 256, (4, 3, 56, 84), generator=torch.Generator().manual_seed(0)).float()
    inputs = processors["preview"](VIDEO, videos=[frames], fps=[1.7])
    assert torch.equal(
        inputs.pixel_values_videos, processors["preview"](VIDEO, videos=[frames.byte()]).pixel_values_videos
    )


@pytest.mark.parametrize("edition", EDITIONS)
def test_uint8_pixels_are_normalised_by_the_configuration_to_the_same_values(processors, clip, edition):
    processor = processors[edition]
    _, videos, kwargs = process_vision_info(user({"video": clip}), True, edition=edition)
    picture = Image.fromarray(decode_clip(clip)[0])
    text = "<|image_pad|>" + VIDEO
    float_inputs = processor(text, images=picture, videos=videos, **kwargs)
    inputs = processor(text, images=picture, videos=videos, pixel_dtype="uint8", **kwargs)
    for name in ("pixel_values", "pixel_values_videos"):
        assert inputs[name].dtype == torch.uint8
        assert inputs[name].shape[1:] == (3, 14, 14)
        assert torch.equal(processor.patch_config.normalize(inputs[name]), float_inputs[name])
    with pytest.raises(ValueError, match="pixel_dtype must be"):
        processor(text, images=picture, videos=videos, pixel_dtype="int8", **kwargs)


def test_repeated_placeholder_ids_equal_encoding_the_whole_text(processors):
    processor = processors["1.5"]
    frames = torch.zeros(3, 3, 56, 112, dtype=torch.uint8)
    inputs = processor(f"a <|image_pad|> b{VIDEO}c", images=frames[0], videos=[frames], timestamps=[[0.0, 1.5, 12.25]])
    whole = f"a {'<|image_pad|>' * 8} b<|vision_start|>" + "".join(
        f"<|frame|>{time}{'<|video_pad|>' * 8}" for time in ("0.0", "1.5", "12.2")
    )
    assert inputs.input_ids[0].tolist() == processor.tokenizer.encode(f"{whole}<|vision_end|>c")


def test_padding_may_stand_on_the_right(processors):
    inputs = processors["1.5"](["a", "abc"], padding_side="right")
    assert inputs.attention_mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    with pytest.raises(ValueError, match="padding_side"):
        processors["1.5"]("a", padding_side="top")


# ------------------------------------------------------------------------------------------------------------ workers


@pytest.mark.parametrize("edition", EDITIONS)
def test_workers_return_the_same_in_the_same_order(clip, capfd, edition):
    clips = [clip, encode_clip(20, fps=10, height=80), encode_clip(30, fps=10, width=128)]
    messages = user(*({"video": content} for content in clips))
    messages[0]["content"].insert(1, {"type": "image", "image": Image.new("RGB", (30, 40))})
    images, videos, kwargs = process_vision_info(messages, True, edition=edition)
    same_images, same_videos, same_kwargs = process_vision_info(
        messages, True, edition=edition, workers=3, progress=True
    )
    assert "4/4" in capfd.readouterr().err
    assert len(images) == len(same_images) == 1
    assert all(torch.equal(a, b) for a, b in zip(videos, same_videos, strict=True))
    assert str(kwargs) == str(same_kwargs)


def test_an_error_in_one_of_several_videos_is_raised(clip):
    with pytest.raises(ValueError, match="<4 bytes>"):
        process_vision_info(user({"video": clip}, {"video": b"junk"}, {"video": clip}), workers=2)
    with pytest.raises(ValueError, match="workers must be"):
        process_vision_info(user({"video": clip}), workers=0)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_nothing_stays_open(tmp_path, clip):
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip)
    (tmp_path / "half.mp4").write_bytes(clip[: len(clip) // 2])
    before = len(os.listdir("/proc/self/fd"))
    process_vision_info(user({"video": str(path)}), edition="1.5")
    for _ in range(3):
        with pytest.raises(ValueError, match=r"half\.mp4"):
            process_vision_info(user({"video": str(tmp_path / "half.mp4")}))
    assert len(os.listdir("/proc/self/fd")) == before
