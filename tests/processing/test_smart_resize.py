"""Sizes of resized images, compared with the tables of the official packages."""

import json
from functools import lru_cache

import pytest

from keye_kernels.processing.resize import smart_resize, smart_resize_processor
from tests.helpers.golden import golden

VARIANTS = [
    "processor",
    "processor_small_max",
    "utils_1_0_image",
    "utils_1_0_video",
    "utils_1_0_small_max",
    "utils_1_5_image",
    "utils_1_5_video",
    "utils_1_5_small_max",
]


@lru_cache
def _preview_table():
    return json.loads(golden("preview", "smart_resize.json").read_text())


@pytest.mark.parametrize("variant", VARIANTS)
def test_sizes_equal_the_official_ones(variant):
    table = _preview_table()
    limits = table["variants"][variant]
    resize = smart_resize_processor if variant.startswith("processor") else smart_resize
    assert table["rows"]
    for row in table["rows"]:
        expected = row[variant]
        if expected == "ValueError":
            with pytest.raises(ValueError, match="200 times"):
                resize(row["height"], row["width"], **limits)
        elif 0 in expected:
            with pytest.raises(ValueError, match=f"max_pixels={limits['max_pixels']}"):
                resize(row["height"], row["width"], **limits)
        else:
            assert list(resize(row["height"], row["width"], **limits)) == expected, row


def test_every_recorded_variant_is_tested():
    assert set(VARIANTS) == set(_preview_table()["variants"])


def test_sizes_equal_those_of_keye_vl_utils_1_5():
    cases = json.loads(golden("v1_5", "slow_fast.json").read_text())["smart_resize_cases"]
    assert cases
    for height, width, min_pixels, max_pixels, expected in cases:
        if expected == "ValueError":
            with pytest.raises(ValueError, match="200 times"):
                smart_resize(height, width, min_pixels=min_pixels, max_pixels=max_pixels)
        else:
            assert list(smart_resize(height, width, min_pixels=min_pixels, max_pixels=max_pixels)) == expected


@pytest.mark.parametrize("resize", [smart_resize, smart_resize_processor])
@pytest.mark.parametrize(("height", "width"), [(0, 10), (10, 0), (-28, 28)])
def test_a_size_that_is_not_positive_is_rejected(resize, height, width):
    with pytest.raises(ValueError, match="height and width must be positive"):
        resize(height, width, min_pixels=3136, max_pixels=12544)


@pytest.mark.parametrize("resize", [smart_resize, smart_resize_processor])
@pytest.mark.parametrize("limits", [(0, 12544), (3136, 0), (3136, -1)])
def test_a_limit_that_is_not_positive_is_rejected(resize, limits):
    with pytest.raises(ValueError, match="min_pixels and max_pixels must be positive"):
        resize(100, 100, min_pixels=limits[0], max_pixels=limits[1])


def test_the_processor_enlarges_short_sides_first_and_keye_vl_utils_does_not():
    limits = {"min_pixels": 3136, "max_pixels": 1003520}
    assert smart_resize_processor(100, 20, **limits) == (140, 28)
    assert smart_resize(100, 20, **limits) == (112, 28)


def test_halves_round_to_even():
    # 70 / 28 = 2.5 and 98 / 28 = 3.5
    assert smart_resize(70, 98, min_pixels=1, max_pixels=10**9) == (56, 112)
