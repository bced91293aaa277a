"""`PixelNorm`: what it reads from preprocessor_config.json, its defaults, and the values that it refuses."""

import pytest

from keye_kernels.pixel_norm import PixelNorm

DEFAULT = PixelNorm((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 1 / 255)


def test_entries_and_defaults():
    assert PixelNorm() == PixelNorm.from_dict({}) == DEFAULT
    assert PixelNorm.from_dict({"image_mean": None, "image_std": None, "rescale_factor": None}) == DEFAULT
    mean, std = [0, 0.25, -1], (1, 2.0, 4)
    assert PixelNorm.from_dict({"image_mean": mean}) == DEFAULT._replace(image_mean=(0.0, 0.25, -1.0))
    assert PixelNorm.from_dict({"image_std": std}) == DEFAULT._replace(image_std=(1.0, 2.0, 4.0))
    assert PixelNorm.from_dict({"rescale_factor": 1}) == DEFAULT._replace(rescale_factor=1)
    whole = PixelNorm.from_dict({"image_mean": mean, "image_std": std, "rescale_factor": 0.5, "do_resize": True})
    assert whole == PixelNorm((0.0, 0.25, -1.0), (1.0, 2.0, 4.0), 0.5)
    assert all(type(number) is float for numbers in whole[:2] for number in numbers)


@pytest.mark.parametrize("name", ["image_mean", "image_std"])
@pytest.mark.parametrize(
    "numbers",
    [[0.5, 0.5], [0.5] * 4, [], 0.5, "0.5", [0.5, 0.5, "0.5"], [0.5, True, 0.5], [0.5, float("nan"), 0.5], [1, 1, float("inf")],
     [0.5, None, 0.5], {0.1: 1, 0.2: 2, 0.3: 3}],
    ids=str,
)  # fmt: skip
def test_three_finite_numbers_are_needed(name, numbers):
    with pytest.raises(ValueError, match=rf"{name} in preprocessor_config\.json must hold 3 numbers"):
        PixelNorm.from_dict({name: numbers})


@pytest.mark.parametrize("channel", range(3))
def test_only_the_mean_may_be_zero(channel):
    numbers = [0.5] * 3
    numbers[channel] = 0
    assert PixelNorm.from_dict({"image_mean": numbers}).image_mean[channel] == 0
    with pytest.raises(ValueError, match=r"image_std in preprocessor_config\.json must hold 3 numbers other than 0"):
        PixelNorm.from_dict({"image_std": numbers})


@pytest.mark.parametrize("factor", [0, 0.0, float("nan"), float("inf"), "1", True, [1]], ids=repr)
def test_the_factor_must_be_a_number_other_than_0(factor):
    with pytest.raises(ValueError, match=r"rescale_factor in preprocessor_config\.json must be a number other than 0"):
        PixelNorm.from_dict({"rescale_factor": factor})


@pytest.mark.parametrize(
    "config",
    [
        {"image_std": [0.5, 0.5, 1e-40]},
        {"image_std": [1e300] * 3},
        {"image_mean": [1e300] * 3},
        {"rescale_factor": 1e-40},
        {"rescale_factor": 1e30},
    ],
    ids=str,
)
def test_numbers_that_would_make_infinite_pixels_are_rejected(config):
    name = next(iter(config))
    with pytest.raises(ValueError, match=rf"{name} in preprocessor_config\.json must"):
        PixelNorm.from_dict(config)
