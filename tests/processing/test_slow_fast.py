"""Sampling, slow and fast frames and their sizes in Keye-VL-1.5, compared with the tables of the official package."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from keye_kernels.processing import process_vision_info
from keye_kernels.processing.sampling import sample_indices, slow_fast_frame_count, slow_fast_sizes
from keye_kernels.processing.slow_fast import FAST, SLOW, SlowFastClassifier, block_similarity, hsv_blocks, rgb_to_hsv
from tests.helpers.golden import golden
from tests.helpers.messages import user_videos
from tests.helpers.video_clips import encode_clip

# Tolerance of similarities in the golden README
SIMILARITY_ATOL = 0.02


def table(name):
    return json.loads(golden("v1_5", "slow_fast.json").read_text())[name]


def video_frames(name):
    videos = np.load(golden("v1_5", "slow_fast_videos.npz"))
    return videos[f"{name}.frames"][videos[f"{name}.index"]]


def file_cases(mode):
    return [case for case in table("video_cases") if case["mode"] == mode]


def expected_kwargs(case):
    sizes = {name: [case[name]] for name in ("height", "width", "fast_height", "fast_width")}
    return {**sizes, "timestamps": case["timestamps"], "frame_types": case["frame_types"]}


def plain_kwargs(kwargs):
    (times,), (types,) = kwargs["timestamps"], kwargs["frame_types"]
    assert types.dtype == torch.int32
    assert times is None or times.dtype == torch.float32
    return {**kwargs, "timestamps": None if times is None else times.tolist(), "frame_types": types.tolist()}


def test_frame_counts_and_indices_equal_the_official_ones():
    for case in table("nframes_cases"):
        count = slow_fast_frame_count(case["options"], case["total_frames"], case["video_fps"])
        indices = sample_indices(0, case["total_frames"] - 1, count)
        assert count == case["nframes"], case
        assert indices[:12] == case["first_indices"], case
        assert indices[-4:] == case["last_indices"], case
        assert sum(indices) == case["index_sum"], case


def test_sizes_equal_the_official_ones():
    for case in table("budget_cases"):
        slow, fast = slow_fast_sizes(
            case["options"], case["frame_height"], case["frame_width"], case["slow_frames"], case["fast_frames"]
        )
        assert (*slow, *fast) == (case["height"], case["width"], case["fast_height"], case["fast_width"]), case
        tokens = case["slow_frames"] * math.prod(slow) + case["fast_frames"] * math.prod(fast)
        assert tokens == 784 * case["tokens_total"], case


def test_frame_types_and_similarities_equal_the_official_ones():
    for case in file_cases("file"):
        frames = torch.from_numpy(video_frames(case["video"])).permute(0, 3, 1, 2)
        frames = frames[sample_indices(0, len(frames) - 1, case["num_frames"])]
        classify = SlowFastClassifier(case["frame_height"], case["frame_width"], case["threshold"])
        assert classify.size == (case["similarity_height"], case["similarity_width"])
        resized = torch.nn.functional.interpolate(frames, classify.size, mode="bilinear", antialias=True)
        last_slow = None
        for frame, small, kind, expected in zip(
            frames, resized, case["frame_types"], case["similarity_to_last_slow"], strict=True
        ):
            patches = hsv_blocks(small)
            if last_slow is not None:
                similarity = block_similarity(last_slow, patches)
                expected = math.nan if expected is None else expected
                assert similarity == pytest.approx(expected, abs=SIMILARITY_ATOL, nan_ok=True), case
            assert classify(frame) == kind, case
            last_slow = patches if kind == SLOW else last_slow


def test_lossless_files_have_the_official_types_times_and_sizes():
    for case in file_cases("file"):
        frames = video_frames(case["video"])
        clip = encode_clip(
            len(frames),
            fps=round(case["source_fps"]),
            height=case["frame_height"],
            width=case["frame_width"],
            codec="ffv1",
            container="mkv",
            pix_fmt="bgr0",
            draw=lambda index, height, width, frames=frames: frames[index],
        )
        _, videos, kwargs = process_vision_info(user_videos({"video": clip, **case["options"]}), edition="1.5")
        assert plain_kwargs(kwargs) == expected_kwargs(case), case
        assert len(videos[0]) == case["num_frames"]


def test_lists_of_images_have_the_official_types_times_and_sizes():
    for case in file_cases("image_list"):
        frames = video_frames(case["video"])
        as_images = [Image.fromarray(frame) for frame in frames]
        as_tensor = torch.from_numpy(frames).permute(0, 3, 1, 2)
        for video in (as_images, frames, as_tensor):
            _, videos, kwargs = process_vision_info(user_videos({"video": video, **case["options"]}), edition="1.5")
            assert plain_kwargs(kwargs) == expected_kwargs(case), case
            assert videos[0].shape == (case["num_frames"], 3, case["frame_height"], case["frame_width"])


def test_hsv_equals_opencv():
    # Results of cv2.cvtColor(..., COLOR_RGB2HSV); in some of them the hue wraps around.
    expected = {
        (255, 0, 0): (0, 255, 255),
        (0, 255, 0): (60, 255, 255),
        (0, 0, 255): (120, 255, 255),
        (255, 0, 1): (0, 255, 255),
        (255, 0, 4): (0, 255, 255),
        (10, 20, 30): (105, 170, 30),
        (7, 7, 7): (0, 0, 7),
        (200, 3, 199): (150, 251, 200),
        (13, 77, 201): (110, 238, 201),
        (254, 255, 253): (45, 2, 255),
        (90, 45, 44): (1, 130, 90),
    }
    colors = torch.tensor(list(expected), dtype=torch.uint8).T[:, None]
    assert rgb_to_hsv(colors).dtype == torch.uint8
    assert [tuple(color) for color in rgb_to_hsv(colors)[:, 0].T.tolist()] == list(expected.values())


def test_a_video_one_block_high_or_wide_is_classified():
    for height, width in ((10, 1900), (1900, 10)):
        classify = SlowFastClassifier(height, width)
        assert 28 in classify.size
        gray = torch.full((3, height, width), 128, dtype=torch.uint8)
        blue = torch.tensor([0, 0, 255], dtype=torch.uint8).view(3, 1, 1).expand(3, height, width)
        assert [classify(frame) for frame in (gray, gray, blue, blue)] == [SLOW, FAST, SLOW, FAST]


def test_blocks_that_are_black_in_both_frames_do_not_count():
    black, gray, blue = ((0, 0, 0), (128, 128, 128), (0, 0, 255))
    a, b = torch.zeros(2, 3, 28, 84, dtype=torch.uint8)
    for image, colors in ((a, (black, gray, gray)), (b, (black, gray, blue))):
        for column, color in enumerate(colors):
            image[:, :, 28 * column : 28 * column + 28] = torch.tensor(color).view(3, 1, 1)
    assert block_similarity(hsv_blocks(a), hsv_blocks(b)) == 0.5
    assert math.isnan(block_similarity(hsv_blocks(a)[:1], hsv_blocks(b)[:1]))


def test_nine_of_ten_equal_blocks_are_below_the_threshold_as_in_the_official_package():
    # The mean 0.9 in float32 is less than the threshold 0.9 in float64.
    gray = torch.full((3, 56, 140), 128, dtype=torch.uint8)
    other = gray.clone()
    other[:, :28, :28] = torch.tensor([0, 0, 255]).view(3, 1, 1)
    similarity = block_similarity(hsv_blocks(gray), hsv_blocks(other))
    assert similarity == pytest.approx(0.9)
    assert similarity < 0.9
