"""Videos at a limit: first and last frame of a range, exact budgets, similarity thresholds, frame rates, damaged ends."""

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from keye_kernels.processing import video_reader
from keye_kernels.processing.sampling import (
    FRAME_PIXEL_LIMITS,
    check_options,
    frame_range,
    preview_frame_count,
    preview_frame_size,
    slow_fast_frame_limit,
    slow_fast_sizes,
)
from keye_kernels.processing.slow_fast import FAST, SLOW, SlowFastClassifier, block_similarity, hsv_blocks
from keye_kernels.processing.video_reader import VideoReader
from keye_kernels.processing.videos import fetch_video, open_video
from tests.helpers.video_clips import encode_clip

TOKEN = 784


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (None, None, (0, 59)),
        (0.0, 6.0, (0, 59)),
        (1.0, 3.0, (10, 30)),
        (1.01, 2.99, (11, 29)),
        (1.09, 2.91, (11, 29)),
        (2.0, 2.0, (20, 20)),
        (-5.0, 0.0, (0, 0)),
        (5.9, 100.0, (59, 59)),
    ],
)
def test_a_range_holds_the_frames_from_start_to_end_both_included(start, end, expected):
    assert frame_range({"video_start": start, "video_end": end}, 60, 10.0) == expected


@pytest.mark.parametrize(("start", "end"), [(2.0, 1.9), (6.0, None), (2.01, 2.09)])
def test_a_range_between_two_frames_or_after_the_last_one_is_rejected(start, end):
    with pytest.raises(ValueError, match="holds no frame"):
        frame_range({"video_start": start, "video_end": end}, 60, 10.0)


@pytest.mark.parametrize("edition", ["preview", "1.5"])
def test_a_range_of_a_variable_rate_file_includes_both_ends(edition):
    clip = encode_clip(5, pts=[0, 500, 1500, 2000, 4000], container="mkv")
    part = {"video": clip, "fps": 50, "video_start": 0.5, "video_end": 2.0}
    assert set(fetch_video(part, edition=edition).seconds.tolist()) <= {0.5, 1.5, 2.0}
    assert fetch_video(part, edition=edition).seconds[[0, -1]].tolist() == [0.5, 2.0]
    single = fetch_video({**part, "video_end": 0.5}, edition=edition)
    assert set(single.seconds.tolist()) == {0.5}


def test_the_limits_of_options_are_included():
    for fps in (1e-5, 1000, 1000.0):
        check_options({"fps": fps})
    for fps in (0.99e-5, 1000.1):
        with pytest.raises(ValueError, match=r"fps must be a number from 1e-05 to 1000, got"):
            check_options({"fps": fps})
    check_options({"min_pixels": 784, "max_pixels": 784, "video_start": -1, "min_frame_similarity": 1.0})


def test_preview_may_sample_all_frames_or_two():
    assert preview_frame_count({"nframes": 8}, 8, 10.0) == 8
    assert preview_frame_count({"nframes": 2}, 8, 10.0) == 2
    assert preview_frame_count({"min_frames": 8}, 8, 10.0) == 8
    assert preview_frame_count({"min_frames": 4, "max_frames": 2}, 8, 10.0) == 2


def test_preview_enlarges_small_frames():
    # At least 128 tokens of 28 x 28 pixels
    assert preview_frame_size({}, 20, 64, 96) == (280, 392)
    assert preview_frame_size({"min_pixels": 784}, 20, 64, 96) == (56, 84)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 1365),
        ({"max_frames": 10}, 10),
        ({"max_frames": 5000}, 1365),
        ({"min_pixels": 96 * TOKEN}, 682),
        ({"video_total_pixels": 10 * 48 * TOKEN}, 10),
        ({"video_total_pixels": 10 * 48 * TOKEN - 1}, 9),
    ],
)
def test_frames_of_1_5_are_limited_by_the_budget_of_smallest_frames(options, expected):
    assert slow_fast_frame_limit(options) == expected


@pytest.mark.parametrize(("budget", "side"), [(100, 10), (120, 10), (121, 11), (143, 11), (144, 12)])
def test_a_frame_may_use_its_budget_and_one_token_more(budget, side):
    """As in the official package, the limit of a slow frame is one token above the largest that fits the video's budget."""
    slow, _ = slow_fast_sizes({"video_total_pixels": (budget - 1) * TOKEN}, 2800, 2800, 1, 0)
    assert slow == (28 * side, 28 * side)


def test_min_pixels_of_1_5_is_at_least_that_of_the_edition():
    smallest = slow_fast_sizes({}, 56, 56, 1, 1)
    assert smallest == slow_fast_sizes({"min_pixels": TOKEN}, 56, 56, 1, 1) == ((196, 196), (196, 196))
    assert FRAME_PIXEL_LIMITS[0] <= 196 * 196
    assert slow_fast_sizes({"min_pixels": 400 * TOKEN}, 56, 56, 1, 1)[0] == (560, 560)


def frame(*blue):
    """A gray frame of 6 x 10 blocks, with these blocks blue."""
    pixels = torch.full((3, 168, 280), 128, dtype=torch.uint8)
    for index in blue:
        row, column = 28 * (index // 10), 28 * (index % 10)
        pixels[:, row : row + 28, column : column + 28] = torch.tensor([0, 0, 255]).view(3, 1, 1)
    return pixels


@pytest.mark.parametrize(("threshold", "expected"), [(1.0, FAST), (1.001, SLOW), (0, FAST), (None, FAST)])
def test_an_equal_frame_has_a_similarity_of_exactly_1(threshold, expected):
    classify = SlowFastClassifier(168, 280, threshold)
    assert classify.size == (168, 280)
    assert [classify(frame()), classify(frame())] == [SLOW, expected]


def test_a_similarity_equal_to_the_threshold_is_fast_and_0_is_a_threshold():
    half = range(30)
    for threshold, expected in ((0.5, FAST), (0.51, SLOW), (0.0, FAST), (None, SLOW)):
        classify = SlowFastClassifier(168, 280, threshold)
        assert [classify(frame()), classify(frame(*half))] == [SLOW, expected], threshold
    classify = SlowFastClassifier(168, 280, 0.0)
    assert [classify(frame()), classify(frame(*range(60)))] == [SLOW, FAST]


def test_frames_are_compared_with_the_last_slow_frame_and_not_with_the_last_one():
    classify = SlowFastClassifier(168, 280, 0.7)
    # Each frame equals the one before it in 80 % of the blocks.
    assert [classify(frame(*range(12 * index))) for index in range(4)] == [SLOW, FAST, SLOW, FAST]


def test_black_frames_are_similar_and_a_block_that_is_black_in_one_frame_counts():
    black = torch.zeros(3, 168, 280, dtype=torch.uint8)
    classify = SlowFastClassifier(168, 280)
    assert [classify(image) for image in (black, black, frame(), black)] == [SLOW, FAST, SLOW, SLOW]
    half = frame()
    half[:, :84] = 0
    assert block_similarity(hsv_blocks(half), hsv_blocks(frame())) == 0.5


def test_a_cosine_of_exactly_0_7_is_not_similar():
    a, b = torch.tensor([[10.0, 0, 0, 0]]), torch.tensor([[7.0, 7, 1, 1]])
    assert block_similarity(a, b) == 0
    assert block_similarity(a, torch.tensor([[7.1, 7, 1, 1]])) == 1


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
