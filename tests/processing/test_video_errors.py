"""Videos and options that cannot be used: one clear error each, and nothing left over."""

import io
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from keye_kernels.processing import process_vision_info
from keye_kernels.processing.truncation import declared_size
from keye_kernels.processing.videos import fetch_video
from tests.helpers.http_answers import answer
from tests.helpers.video_clips import encode_clip

EDITIONS = ["preview", "1.5"]


@pytest.fixture(scope="module")
def clip():
    return encode_clip(40, fps=10)


@contextmanager
def serving(respond):
    """The address of a server whose every answer ``respond(handler)`` writes."""
    handler = type("Handler", (BaseHTTPRequestHandler,), {"do_GET": respond, "log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/clip.mp4"
    finally:
        server.shutdown()
        server.server_close()


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("edition", EDITIONS)
@pytest.mark.parametrize("content", [b"", b"no video", b"\x00\x00\x00\x18ftypmp42", b"#EXTM3U\nfile:///etc/hostname\n"])
def test_what_is_no_video_is_refused(edition, content):
    with pytest.raises(ValueError, match=f"<{len(content)} bytes> cannot be opened"):
        fetch_video({"video": content}, edition=edition)


def test_text_files_are_not_drawn_as_a_terminal(tmp_path):
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
def test_truncated_files_are_refused(container, share):
    content = encode_clip(40, codec="libvpx-vp9" if container == "webm" else "libx264", container=container)
    with pytest.raises(ValueError, match="truncated"):
        fetch_video({"video": content[: int(len(content) * share)]})


def test_a_truncated_file_that_begins_with_its_index_is_refused():
    content = encode_clip(40, movflags="faststart")
    with pytest.raises(ValueError, match="truncated"):
        fetch_video({"video": content[: len(content) * 3 // 4]})


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_noise_inside_a_file_is_refused(codec):
    content = bytearray(encode_clip(40, codec=codec, height=128, width=160, draw=_busy_frame))
    quarter = len(content) // 4
    content[quarter : 2 * quarter] = np.random.default_rng(0).bytes(quarter)
    for edition in EDITIONS:
        with pytest.raises(ValueError, match="damaged or truncated"):
            fetch_video({"video": bytes(content), "fps": 10}, edition=edition)


def test_noise_inside_one_frame_is_refused():
    # FFmpeg would paint over it, and the frames chosen here, 0, 13, 26 and 39, would inherit that.
    content = bytearray(encode_clip(40, height=128, width=160, draw=_busy_frame))
    position, size = _packets(content)[20]
    content[position + size // 4 : position + size // 2] = np.random.default_rng(0).bytes(size // 2 - size // 4)
    with pytest.raises(ValueError, match="damaged or truncated"):
        fetch_video({"video": bytes(content), "fps": 1}, edition="1.5")


def test_a_file_cut_off_between_two_frames_is_refused():
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


def test_declared_sizes_are_those_of_whole_files():
    for container, codec in (("mkv", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4")):
        content = encode_clip(5, codec=codec, container=container)
        assert declared_size(io.BytesIO(content)) == len(content)
    # A recorder that cannot go back writes "unknown".
    head = bytes.fromhex("1a45dfa3 80 18538067 01ffffffffffffff")
    assert declared_size(io.BytesIO(head)) is None
    for content in (b"", b"RIFF", b"\x1a\x45\xdf\xa3", b"\x00" * 20, encode_clip(5)):
        assert declared_size(io.BytesIO(content)) is None


def test_audio_alone_is_refused_and_named(tmp_path):
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
def test_frames_100000_wide_and_2_high_are_refused(edition):
    with pytest.raises(ValueError, match="200 times"):
        fetch_video({"video": [Image.new("RGB", (100_000, 2))] * 2}, edition=edition)
    strip = encode_clip(4, height=2, width=2000, codec="ffv1", container="mkv")
    with pytest.raises(ValueError, match="200 times"):
        fetch_video({"video": strip}, edition=edition)


@pytest.mark.parametrize("edition", EDITIONS)
def test_frames_beyond_pillows_limit_are_refused(monkeypatch, clip, edition):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 96 // 2 - 1)
    with pytest.raises(ValueError, match=r"decompression bomb.*PIL\.Image\.MAX_IMAGE_PIXELS"):
        fetch_video({"video": clip}, edition=edition)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    fetch_video({"video": clip}, edition=edition)


def test_a_missing_pyav_is_named_with_the_command_that_installs_it(monkeypatch, clip):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match="pip install av"):
        fetch_video({"video": clip})


# ------------------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize("edition", EDITIONS)
@pytest.mark.parametrize(
    "options",
    [
        *({"fps": value} for value in (0, -1, 1e9, 1e-9, float("nan"), float("inf"), "2", True)),
        *({name: 0} for name in ("min_frames", "max_frames", "min_pixels", "max_pixels")),
        {"nframes": -4},
        {"video_total_pixels": -1},
        {"total_pixels": float("inf")},
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


def test_fps_and_nframes_exclude_each_other(clip):
    with pytest.raises(ValueError, match="fps and nframes"):
        fetch_video({"video": clip, "fps": 1, "nframes": 4})


@pytest.mark.parametrize("nframes", [1, 0.4, 42])
def test_a_number_of_frames_that_the_clip_cannot_give_is_refused(clip, nframes):
    with pytest.raises(ValueError, match="from 2 to the 40 frames"):
        fetch_video({"video": clip, "nframes": nframes})


@pytest.mark.parametrize("edition", EDITIONS)
@pytest.mark.parametrize("start_and_end", [(9, None), (3, 1), (None, -1)], ids=str)
@pytest.mark.parametrize("rate", ["constant", "variable"])
def test_a_range_without_frames_is_refused(edition, start_and_end, rate, clip):
    options = dict(zip(("video_start", "video_end"), start_and_end, strict=True))
    if rate == "variable":
        clip = encode_clip(4, pts=[0, 100, 1700, 4000])
    if start_and_end[1] == -1 and rate == "constant":
        # Times are cut to the clip, as in the official package, so that frame 0 is left.
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
        ([b"no picture"], ValueError, "Pillow"),
    ],
)
def test_other_sources_are_refused(video, error, message):
    for edition in EDITIONS:
        with pytest.raises(error, match=message):
            process_vision_info([{"role": "user", "content": [{"type": "video", "video": video}]}], edition=edition)


# ---------------------------------------------------------------------------------------------------------- downloads


def test_a_clip_behind_an_address_is_read(clip):
    with serving(answer(clip)) as address:
        downloaded = fetch_video({"video": address})
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
def test_downloads_that_are_no_clip_are_refused(respond, message):
    with serving(respond) as address, pytest.raises(ValueError, match=message):
        fetch_video({"video": address}, max_bytes=4000)


def test_a_download_that_never_ends_meets_the_time_limit():
    def drip(handler):
        handler.send_response(200)
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(b"x")
                time.sleep(0.05)
        except OSError:
            pass

    with serving(drip) as address, pytest.raises(ValueError, match=r"within timeout=0\.3 seconds"):
        process_vision_info([{"role": "user", "content": [{"type": "video", "video": address}]}], timeout=0.3)
