"""The errors for videos that cannot be read and for invalid video options."""

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from keye_kernels.editions import EDITIONS
from keye_kernels.processing import process_vision_info
from keye_kernels.processing.images import fetch_image
from keye_kernels.processing.truncation import declared_size
from keye_kernels.processing.videos import fetch_video
from tests.helpers.http_answers import answer, answer_endlessly
from tests.helpers.messages import user_videos
from tests.helpers.video_clips import encode_clip


@pytest.fixture(scope="module")
def clip():
    return encode_clip(40, fps=10)


@pytest.mark.parametrize("edition", EDITIONS)
@pytest.mark.parametrize("content", [b"", b"no video", b"\x00\x00\x00\x18ftypmp42", b"#EXTM3U\nfile:///etc/hostname\n"])
def test_bytes_that_are_not_a_video_are_rejected(edition, content):
    with pytest.raises(ValueError, match=f"<{len(content)} bytes> cannot be opened"):
        fetch_video({"video": content}, edition=edition)


def test_text_files_are_rejected(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("hello\n" * 200)
    with pytest.raises(ValueError, match=r"notes\.txt"):
        fetch_video({"video": path})


def test_playlists_cannot_open_other_files(tmp_path, clip):
    (tmp_path / "clip.mp4").write_bytes(clip)
    for name, content in (
        ("list.ffconcat", "ffconcat version 1.0\nfile clip.mp4\n"),
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nclip.mp4\n#EXT-X-ENDLIST\n"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=name):
            fetch_video({"video": tmp_path / name})


@pytest.mark.parametrize("container", ["mp4", "mkv", "avi", "webm"])
@pytest.mark.parametrize("share", [0.5, 0.97])
def test_truncated_files_are_rejected(container, share):
    content = encode_clip(40, codec="libvpx-vp9" if container == "webm" else "libx264", container=container)
    with pytest.raises(ValueError, match="truncated"):
        fetch_video({"video": content[: int(len(content) * share)]})


def test_a_truncated_file_with_its_index_at_the_start_is_rejected():
    content = encode_clip(40, movflags="faststart")
    with pytest.raises(ValueError, match="truncated"):
        fetch_video({"video": content[: len(content) * 3 // 4]})


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_noise_within_a_file_is_rejected(codec):
    content = bytearray(encode_clip(40, codec=codec, height=128, width=160, draw=_busy_frame))
    quarter = len(content) // 4
    content[quarter : 2 * quarter] = np.random.default_rng(0).bytes(quarter)
    for edition in EDITIONS:
        with pytest.raises(ValueError, match="damaged or truncated"):
            fetch_video({"video": bytes(content), "fps": 10}, edition=edition)


def test_noise_within_one_frame_is_rejected():
    # By default FFmpeg conceals the damage, and later frames, also those sampled here (0, 13, 26 and 39), inherit it.
    content = bytearray(encode_clip(40, height=128, width=160, draw=_busy_frame))
    position, size = _packets(content)[20]
    content[position + size // 4 : position + size // 2] = np.random.default_rng(0).bytes(size // 2 - size // 4)
    with pytest.raises(ValueError, match="damaged or truncated"):
        fetch_video({"video": bytes(content), "fps": 1}, edition="1.5")


def test_a_file_truncated_between_two_frames_is_rejected():
    content = encode_clip(40, movflags="faststart")
    position, _ = _packets(content)[35]
    with pytest.raises(ValueError, match="it has 35 of 40 frames"):
        fetch_video({"video": content[:position]})


def _packets(content):
    av = pytest.importorskip("av")
    with av.open(io.BytesIO(content)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


def _busy_frame(index, height, width):
    return np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_declared_size_is_the_size_of_a_complete_file():
    for container, codec in (("mkv", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4")):
        content = encode_clip(5, codec=codec, container=container)
        assert declared_size(io.BytesIO(content)) == len(content)
    # A live recording has the size "unknown".
    head = bytes.fromhex("1a45dfa3 80 18538067 01ffffffffffffff")
    assert declared_size(io.BytesIO(head)) is None
    for content in (b"", b"RIFF", b"\x1a\x45\xdf\xa3", b"\x00" * 20, encode_clip(5)):
        assert declared_size(io.BytesIO(content)) is None


def test_a_file_without_video_is_rejected_and_the_error_lists_its_streams(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    with pytest.raises(ValueError, match=r"sound\.wav' has no video stream \(it has: audio\)"):
        fetch_video({"video": path})


@pytest.mark.parametrize("edition", EDITIONS)
def test_an_extreme_aspect_ratio_is_rejected(edition):
    with pytest.raises(ValueError, match="200 times"):
        fetch_video({"video": [Image.new("RGB", (100_000, 2))] * 2}, edition=edition)
    strip = encode_clip(4, height=2, width=2000, codec="ffv1", container="mkv")
    with pytest.raises(ValueError, match="200 times"):
        fetch_video({"video": strip}, edition=edition)


@pytest.mark.parametrize("edition", EDITIONS)
def test_frames_beyond_pillows_limit_are_rejected(monkeypatch, clip, edition):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 96 // 2 - 1)
    with pytest.raises(ValueError, match=r"decompression bomb.*PIL\.Image\.MAX_IMAGE_PIXELS"):
        fetch_video({"video": clip}, edition=edition)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    fetch_video({"video": clip}, edition=edition)


def test_without_pyav_the_error_shows_the_install_command(monkeypatch, clip):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match="pip install av"):
        fetch_video({"video": clip})


@pytest.mark.parametrize("edition", EDITIONS)
@pytest.mark.parametrize(
    "options",
    [
        *({"fps": value} for value in (0, -1, 1e9, 1e-9, float("nan"), float("inf"), "2", True)),
        *({name: 0} for name in ("min_frames", "max_frames", "min_pixels", "max_pixels")),
        {"nframes": -4},
        {"video_total_pixels": -1},
        {"total_pixels": float("inf")},
        {"total_pixels": 1e12},
        {"video_total_pixels": 1e12},
        {"video_start": "1"},
        {"min_frame_similarity": float("nan")},
    ],
    ids=str,
)
def test_options_out_of_range_are_named(edition, options, clip):
    (name,) = options
    for video in (clip, [Image.new("RGB", (60, 60))] * 2):
        with pytest.raises(ValueError, match=f"{name} must be"):
            fetch_video({"video": video, **options}, edition=edition)


@pytest.mark.parametrize("edition", EDITIONS)
@pytest.mark.parametrize("min_pixels", [1e12, 1e300])
def test_sizes_that_do_not_fit_in_memory_are_rejected(edition, min_pixels, clip):
    options = {"min_pixels": min_pixels, "video_total_pixels": 2**30}
    with pytest.raises(ValueError, match="min_pixels must be at most 134217728"):
        fetch_video({"video": clip, **options}, edition=edition)
    with pytest.raises(ValueError, match="min_pixels must be at most 134217728"):
        fetch_image({"image": Image.new("RGB", (60, 60)), "min_pixels": min_pixels}, edition=edition)


def test_frames_that_do_not_fit_in_memory_together_are_rejected(clip):
    with pytest.raises(ValueError, match=r"40 frames of .* pixels exceed 1073741824 pixels"):
        fetch_video({"video": clip, "nframes": 40, "min_pixels": 2**25})


def test_fps_and_nframes_together_are_rejected(clip):
    with pytest.raises(ValueError, match="fps and nframes"):
        fetch_video({"video": clip, "fps": 1, "nframes": 4})


@pytest.mark.parametrize("nframes", [1, 0.4, 42])
def test_an_impossible_number_of_frames_is_rejected(clip, nframes):
    with pytest.raises(ValueError, match="from 2 to the 40 frames"):
        fetch_video({"video": clip, "nframes": nframes})


@pytest.mark.parametrize("edition", EDITIONS)
@pytest.mark.parametrize("start_and_end", [(9, None), (3, 1), (None, -1)], ids=str)
@pytest.mark.parametrize("rate", ["constant", "variable"])
def test_a_range_without_frames_is_rejected(edition, start_and_end, rate, clip):
    options = dict(zip(("video_start", "video_end"), start_and_end, strict=True))
    if rate == "variable":
        clip = encode_clip(4, pts=[0, 100, 1700, 4000])
    if start_and_end[1] == -1 and rate == "constant":
        # Times are clamped to the clip, as in the official package, so frame 0 remains.
        assert len(fetch_video({"video": clip, **options}, edition="1.5").frames) == 1
        return
    with pytest.raises(ValueError, match="holds no frame; the video lasts"):
        fetch_video({"video": clip, **options}, edition=edition)


@pytest.mark.parametrize(
    ("video", "error", "message"),
    [
        (None, ValueError, "needs 'video'"),
        (3, TypeError, "got int"),
        ([], ValueError, "at least one frame"),
        (torch.zeros(0, 3, 4, 4), ValueError, "at least one frame"),
        (torch.zeros(4, 4, 3), ValueError, r"\[T, 3, H, W\]"),
        ("nowhere.mp4", FileNotFoundError, "does not exist"),
        ("data:video/mp4;base64", ValueError, "base64"),
        (["nowhere.png"], FileNotFoundError, "does not exist"),
        ([b"no image"], ValueError, "Pillow"),
    ],
)
def test_unsupported_sources_are_rejected(video, error, message):
    for edition in EDITIONS:
        with pytest.raises(error, match=message):
            process_vision_info(user_videos({"video": video}), edition=edition)


def test_a_clip_is_downloaded(server, clip):
    server.routes["/clip.mp4"] = answer(clip)
    downloaded = fetch_video({"video": server.address + "/clip.mp4"})
    assert torch.equal(downloaded.frames, fetch_video({"video": clip}).frames)


@pytest.mark.parametrize(
    ("respond", "message"),
    [
        (answer(b"<html></html>"), "cannot be opened"),
        (answer(b"", 404), "404"),
        (answer(b"", 302, Location="file:///etc/hostname"), "Redirection to url 'file"),
        (answer(b"half", **{"Content-Length": "8"}), "4 bytes early"),
        (answer(bytes(5000)), "larger than max_bytes=4000"),
    ],
    ids=["page", "missing", "redirect-to-file", "cut-off", "too-large"],
)
def test_downloads_that_are_not_a_clip_are_rejected(server, respond, message):
    server.routes["/clip.mp4"] = respond
    with pytest.raises(ValueError, match=message):
        fetch_video({"video": server.address + "/clip.mp4"}, max_bytes=4000)


def test_the_time_limit_stops_an_endless_slow_download(server):
    server.routes["/clip.mp4"] = answer_endlessly(b"x", pause=0.05)
    messages = user_videos({"video": server.address + "/clip.mp4"})
    with pytest.raises(ValueError, match=r"within timeout=0\.3 seconds"):
        process_vision_info(messages, timeout=0.3)
