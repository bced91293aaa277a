"""uint8 patches: normalization is folded into the patch embedding."""

import json

import pytest
import torch

import keye_kernels as kk
from keye_kernels.pixel_norm import PixelNorm
from tests.helpers.tiny import prompt, save_checkpoint, tiny_model

NORMS = [PixelNorm(), PixelNorm((0.48, 0.46, 0.41), (0.27, 0.26, 0.28), 1 / 255)]


@pytest.mark.parametrize("norm", NORMS, ids=["half", "clip"])
def test_uint8_patches_give_the_features_of_normalized_patches(norm):
    model = tiny_model()
    model.visual.pixel_norm = norm
    inputs = prompt([(1, 6, 8)])
    gray = torch.randint(0, 256, inputs["pixel_values"].shape, dtype=torch.uint8)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in norm[:2])
    normalized = (gray.float() / 255 - mean) / std
    with torch.no_grad():
        expected = model.get_image_features(normalized, inputs["image_grid_thw"])
        found = model.get_image_features(gray, inputs["image_grid_thw"])
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
        exact = model.double().get_image_features(normalized.double(), inputs["image_grid_thw"])
        half = model.bfloat16()
        error = {
            name: (half.get_image_features(pixels, inputs["image_grid_thw"]).double() - exact).norm() / exact.norm()
            for name, pixels in (("uint8", gray), ("normalized", normalized.bfloat16()))
        }
        assert error["uint8"] < 1.5 * error["normalized"], error


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int8, torch.bool, torch.complex64])
def test_patches_of_other_dtypes_are_refused(dtype):
    inputs = prompt([(1, 4, 6)])
    with pytest.raises(TypeError, match=rf"pixel_values must be normalized floats or uint8, got {dtype}"):
        tiny_model()(**inputs | {"pixel_values": inputs["pixel_values"].to(dtype)})


def test_normalization_is_read_from_the_checkpoint(tmp_path):
    path = save_checkpoint(tiny_model(), tmp_path)
    assert kk.Keye.from_pretrained(path).visual.pixel_norm == PixelNorm()
    values = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 2.0, 4.0], "rescale_factor": 0.5}
    (path / "preprocessor_config.json").write_text(json.dumps(values))
    assert kk.Keye.from_pretrained(path).visual.pixel_norm == PixelNorm((0.1, 0.2, 0.3), (1.0, 2.0, 4.0), 0.5)
