"""Reading video files: formats, times, rotation, sizes and memory."""

import io
import tracemalloc

import numpy as np
import pytest
import torch

from keye_kernels.editions import EDITIONS
from keye_kernels.processing.video_reader import VideoReader
from keye_kernels.processing.videos import fetch_video, open_video
from tests.helpers.video_clips import decode_clip, encode_clip

# name: (codec, container, options), with B-frames, open GOPs, no clean keyframes, hidden frames, or no timestamps
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


@pytest.mark.parametrize("name", FORMATS)
def test_selected_frames_equal_those_of_a_full_decode(name):
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
def test_times_of_variable_rate_files_are_read_from_the_file(container):
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
def test_rotation_metadata_is_applied(edition, rotation):
    content = encode_clip(12, fps=4, rotation=rotation)
    rotated = [np.rot90(frame, rotation / 90) for frame in decode_clip(encode_clip(12, fps=4))]
    sampled = fetch_video({"video": content}, edition=edition)
    if edition == "1.5":
        indices = torch.linspace(0, 11, 6).round().long().tolist()
        np.testing.assert_array_equal(sampled.frames.permute(0, 2, 3, 1), np.stack([rotated[i] for i in indices]))
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


def test_a_long_clip_only_uses_the_memory_of_its_sampled_frames(tmp_path):
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
