"""Videos at a limit: first and last frame of a range, exact budgets, and similarity thresholds."""

import pytest
import torch

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
from keye_kernels.processing.videos import _resize_bicubic, fetch_video
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


def test_black_and_white_stay_black_and_white_where_bicubic_resizing_overshoots():
    stripes = torch.zeros(3, 56, 56, dtype=torch.uint8)
    stripes[:, :, 28:] = 255
    exact = torch.nn.functional.interpolate(stripes[None].float(), (84, 84), mode="bicubic", antialias=True)[0]
    assert exact.min() < -0.5 and exact.max() > 255.5
    assert ((_resize_bicubic(stripes, (84, 84)).float() - exact.clamp(0, 255)).abs() <= 0.5).all()


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
