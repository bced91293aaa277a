"""Scanning of video files: frame rates and times, hidden packets, damaged ends, limits, and which packets are decoded."""

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from keye_kernels.processing import video_reader
from keye_kernels.processing.video_reader import VideoReader
from keye_kernels.processing.videos import fetch_video, open_video
from tests.helpers.video_clips import encode_clip


def reader_of(pts, rate, guessed=None, has_pts=True, tick=Fraction(1, 1000)):
    """A reader with the times of these frames, in ticks."""
    reader = VideoReader.__new__(VideoReader)
    reader.name, reader._has_pts, reader._frame_pts = "clip", has_pts, np.array(pts, dtype=np.int64)
    reader._set_times(SimpleNamespace(time_base=tick, average_rate=rate, guessed_rate=guessed))
    return reader


@pytest.mark.parametrize(
    ("pts", "rate", "fps", "is_constant"),
    [
        ([0, 100, 201], 10, 10, True),  # rounded to ticks
        ([50, 150, 250], 10, 10, True),
        ([0, 100, 201.6], 10, 10, True),
        ([0, 110, 200], 10, 10, False),
        ([0, 99, 201], 1000 / 100.4, 1000 / 100.4, True),  # 1.4 ticks from the constant rate
        ([0, 102, 201], 1000 / 100.4, 1000 / 100.4, False),  # 1.6 ticks
        ([0, 100, 200], 12.5, 12.5, False),  # 20 percent above the measured rate
        ([0, 100, 200], 12.6, 10, True),
        ([0, 100, 200], 30, 10, True),
        ([0, 1000], 30, 1, True),
        ([0, 100, 200], 2000, 10, True),
        ([7], 24, 24, True),
    ],
)
def test_the_rate_of_the_header_is_used_unless_the_times_contradict_it(pts, rate, fps, is_constant):
    reader = reader_of(pts, rate)
    assert reader.fps == pytest.approx(fps, rel=1e-12)
    assert reader.is_constant_rate == is_constant
    assert reader.times[0] == 0


def test_files_without_times_use_the_rate_of_the_header_or_25():
    for rate, guessed, fps in ((12, None, 12), (None, 8, 8), (None, None, 25), (1e6, None, 25)):
        reader = reader_of(range(5), rate, guessed, has_pts=False)
        assert (reader.fps, reader.is_constant_rate) == (fps, True)
        np.testing.assert_allclose(reader.times, np.arange(5) / fps)
    with pytest.raises(ValueError, match="frame rate of 2000"):
        reader_of([0, 1, 2], 0, tick=Fraction(1, 2000))


def scan(packets, *, entries=0, duration=None, start=0, name="mp4"):
    """Scans packets `(pts, changes)` of 100 ms each, and packets of another stream."""
    defaults = {"time_base": Fraction(1, 1000), "duration": 100, "stream_index": 0, "size": 10}
    defaults |= {"is_keyframe": True, "is_discard": False, "is_corrupt": False}
    found = [SimpleNamespace(**{**defaults, "pts": pts, **changes}) for pts, changes in packets]
    container = SimpleNamespace(
        demux=lambda: found,
        duration=None if duration is None else int(1e6 * duration),
        start_time=int(1e6 * start),
        format=SimpleNamespace(name=name),
    )
    reader = VideoReader.__new__(VideoReader)
    reader.name, reader._deadline = "clip", float("inf")
    return reader._scan(container, SimpleNamespace(index=0, index_entries=[None] * entries))


def test_a_scan_marks_hidden_packets_and_skips_other_streams():
    packets = scan(
        [(0, {}), (100, {"is_discard": True}), (200, {"is_keyframe": False}), (0, {"stream_index": 1}), (0, {"size": 0})]
    )
    assert packets.pts == [0, 100, 200]
    assert packets.is_shown.tolist() == [True, False, True]
    assert packets.is_key.tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"duration": 1.0}, None),
        ({"duration": 1.5}, None),  # half a second may be missing
        ({"duration": 1.51}, r"0\.51 of its 1\.51 seconds"),
        ({"duration": 1.8, "name": "matroska,webm", "start": -0.4}, None),
        ({"duration": 1.8, "name": "avi"}, None),
        ({"entries": 10}, None),
        ({"entries": 11}, "10 of 11 frames"),
    ],
)
def test_a_file_with_a_missing_end_is_damaged(options, message):
    packets = [(100 * index, {}) for index in range(10)]
    if message is None:
        assert len(scan(packets, **options).pts) == 10
    else:
        with pytest.raises(ValueError, match=message):
            scan(packets, **options)


def test_one_percent_of_a_long_file_may_be_missing():
    packets = [(index * 1000, {"duration": 1000}) for index in range(200)]
    assert len(scan(packets, duration=202.0).pts) == 200
    with pytest.raises(ValueError, match="seconds are missing"):
        scan(packets, duration=202.1)


def test_a_packet_that_is_cut_off_is_damaged():
    with pytest.raises(ValueError, match="ends in the middle of a frame"):
        scan([(0, {}), (100, {"is_corrupt": True})])


def test_frames_may_have_exactly_pillows_number_of_pixels(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 96 // 2)
    with open_video(encode_clip(2)) as reader:
        assert (reader.height, reader.width) == (64, 96)
        assert len(list(reader.frames([0, 1]))) == 2


def test_packets_may_be_as_many_as_the_limit(monkeypatch):
    monkeypatch.setattr(video_reader, "MAX_PACKETS", 9)
    assert len(scan([(100 * index, {}) for index in range(10)]).pts) == 10
    with pytest.raises(ValueError, match="more than 9 packets"):
        scan([(100 * index, {}) for index in range(11)])


def test_the_cover_image_of_a_file_is_not_its_video(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "sound.m4a"
    with av.open(str(path), "w", format="mp4") as output:
        sound, cover = output.add_stream("aac", rate=8000, layout="mono"), output.add_stream("png", rate=1)
        cover.disposition = av.stream.Disposition.attached_pic
        cover.height, cover.width, cover.pix_fmt = 32, 32, "rgb24"
        output.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        for packets in (sound.encode(frame), sound.encode(None)):
            output.mux(packets)
    with pytest.raises(ValueError, match=r"sound\.m4a' has no video stream \(it has: audio\)"):
        fetch_video({"video": path})


@pytest.mark.parametrize(
    ("wanted", "needed"),
    [
        ({0}, [1, 0, 0, 0, 0, 0, 0]),
        ({1}, [1, 1, 1, 0, 0, 0, 0]),
        ({6}, [0, 0, 0, 1, 0, 0, 0]),
        ({8}, [0, 0, 0, 1, 1, 1, 1]),
        ({4}, [1, 1, 1, 1, 1, 0, 0]),  # shown before its keyframe: it also refers to the previous group
        ({0, 8}, [1, 0, 0, 1, 1, 1, 1]),
    ],
)
def test_packets_from_the_keyframe_to_the_last_wanted_frame_are_decoded(wanted, needed):
    reader = VideoReader.__new__(VideoReader)
    is_key = np.array([1, 0, 0, 1, 0, 0, 0], bool)
    reader._packets = video_reader._Packets([0, 2, 1, 6, 4, 5, 8], is_key, np.ones(7, bool))
    assert reader._packets_to_decode(frozenset(wanted)).tolist() == [bool(value) for value in needed]
