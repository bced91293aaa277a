"""The image processor: its settings, patches and normalization, and the packing of slow and fast frames."""

import numpy as np
import pytest
import torch
from PIL import Image

from keye_kernels.processing.images import load_image
from keye_kernels.processing.packing import pack_video
from keye_kernels.processing.patches import PatchConfig, to_frame_tensors
from tests.helpers.golden import load_golden

# The golden pixels are float32; x * (1 / 255) and x / 255 differ by one rounding.
PIXEL_ATOL = 1e-6


@pytest.mark.parametrize("name", ["image0", "image1", "image2", "video0"])
def test_patches_equal_the_official_ones(name):
    tensors = load_golden("preview", "image_processing.safetensors")
    frames = tensors[f"{name}.uint8"].numpy()
    config = PatchConfig()
    convert = config.videos_to_patches if name == "video0" else config.images_to_patches
    patches, [grid] = convert([frames], "preview", "float32")
    grids = tensors[f"{name}.video_grid_thw" if name == "video0" else f"{name}.image_grid_thw"]
    assert [list(grid)] == grids.tolist()
    torch.testing.assert_close(patches, tensors[f"{name}.pixel_values"], atol=PIXEL_ATOL, rtol=0)


def test_the_first_frame_determines_the_size_of_a_video():
    frames = [np.zeros((56, 84, 3), np.uint8), np.zeros((140, 28, 3), np.uint8)]
    patches, grids = PatchConfig().videos_to_patches([frames], "preview")
    assert grids == [(2, 4, 6)]
    assert patches.shape == (48, 3, 14, 14)


def test_patches_are_row_major_and_channels_first():
    config = PatchConfig(min_pixels=784)
    frame = torch.randint(0, 256, (3, 28, 56), dtype=torch.uint8)
    patches, grids = config.images_to_patches([frame], "preview", "float32")
    assert grids == [(1, 2, 4)]
    expected = (frame.double() / 255 - 0.5) / 0.5
    for index in range(8):
        row, column = divmod(index, 4)
        block = expected[:, 14 * row : 14 * row + 14, 14 * column : 14 * column + 14]
        torch.testing.assert_close(patches[index].double(), block, atol=PIXEL_ATOL, rtol=0)


def test_the_configuration_is_read_from_the_file():
    config = PatchConfig.from_dict(
        {"min_pixels": 784, "max_pixels": 7840, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}, "preview"
    )
    assert (config.min_pixels, config.max_pixels, config.resample) == (784, 7840, Image.Resampling.BICUBIC)
    pixels, _ = config.images_to_patches([torch.full((3, 28, 28), 255, dtype=torch.uint8)], "preview", "float32")
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([0.9, 0.4, 0.7 / 3]))
    assert PatchConfig.from_dict({}, "1.5").resample == Image.Resampling.BILINEAR
    assert PatchConfig.from_dict({"resample": 0}, "1.5").resample == 0
    assert PatchConfig.from_dict({"size": {"shortest_edge": 784, "longest_edge": 7840}}, "1.5").max_pixels == 7840


@pytest.mark.parametrize("config", [{"temporal_patch_size": 2}, {"image_mean": [0.5]}])
def test_an_unsupported_configuration_is_rejected(config):
    with pytest.raises(ValueError, match=next(iter(config))):
        PatchConfig.from_dict(config, "preview")


def test_images_and_videos_may_be_tensors_or_arrays():
    frames = torch.randint(0, 256, (2, 3, 8, 10), dtype=torch.uint8)
    arrays = frames.permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(load_image(frames[0]), arrays[0])
    for video in (frames, frames.float(), arrays, list(arrays), [Image.fromarray(array) for array in arrays]):
        torch.testing.assert_close(torch.stack(to_frame_tensors(video, "preview")), frames)


@pytest.mark.parametrize(
    ("video", "error", "message"),
    [
        (torch.zeros(0, 3, 4, 4), ValueError, "at least one frame"),
        ([], ValueError, "at least one frame"),
        (torch.zeros(2, 2, 5, 6), ValueError, r"\[C, H, W\]"),
        (np.zeros((4, 4, 3), np.uint8), ValueError, r"\[T, H, W, 3\]"),
        (torch.full((1, 3, 4, 4), 300.0), ValueError, "0 to 255"),
        (torch.full((1, 3, 4, 4), 0.3), ValueError, "multiply them by 255"),
        (torch.full((1, 3, 4, 4), float("nan")), ValueError, "0 to 255"),
        ("clip.mp4", TypeError, "process_vision_info"),
    ],
)
def test_an_invalid_video_is_rejected(video, error, message):
    with pytest.raises(error, match=message):
        to_frame_tensors(video, "preview")


def test_consecutive_frames_of_equal_size_share_a_grid():
    frames = [torch.zeros(3, 40, 40, dtype=torch.uint8)] * 5
    types = [0, 1, 1, 0, 1]
    packed = pack_video(frames, PatchConfig(), slow_size=(112, 84), fast_size=(56, 56), frame_types=types)
    assert packed.grid_thw == [(1, 8, 6), (2, 4, 4), (1, 8, 6), (1, 4, 4)]
    equal = pack_video(frames, PatchConfig(), slow_size=(56, 56), fast_size=(56, 56), frame_types=types)
    assert equal.grid_thw == [(5, 4, 4)]
    assert equal.prompt.count("<|fast_start|>") == 3
