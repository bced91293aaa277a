"""Loading and resizing of images, and the errors for images that cannot be loaded."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from keye_kernels.editions import EDITIONS
from keye_kernels.processing import process_vision_info
from keye_kernels.processing.images import fetch_image, load_image
from tests.helpers.http_answers import answer
from tests.helpers.messages import random_image


def encoded(image, image_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def test_every_source_gives_the_same_image(tmp_path, server):
    image = random_image()
    path = tmp_path / "with space.png"
    image.save(path)
    server.routes["/a.png"] = answer(encoded(image))
    data = base64.b64encode(encoded(image)).decode()
    sources = [
        image,
        np.asarray(image),
        encoded(image),
        path,
        str(path),
        f"file://{path}",
        f"file://{str(path).replace(' ', '%20')}",
        f"{server.address}/a.png",
        f"data:image;base64,{data}",
        f"data:image/png;base64,{data}",
    ]
    for source in sources:
        np.testing.assert_array_equal(np.asarray(load_image(source)), np.asarray(image), err_msg=repr(source)[:80])


def test_alpha_is_blended_onto_white_for_preview_and_dropped_for_1_5():
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert load_image(image, edition="preview").getpixel((0, 0)) == (255, 255, 255)
    assert load_image(image, edition="1.5").getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.parametrize("mode", ["L", "P", "LA", "CMYK", "1"])
def test_other_modes_are_converted_by_pillow(mode):
    image = random_image().convert(mode)
    np.testing.assert_array_equal(np.asarray(load_image(image)), np.asarray(image.convert("RGB")))


def test_the_exif_orientation_tag_is_ignored_as_in_the_official_packages():
    exif = Image.Exif()
    exif[0x0112] = 6
    loaded = load_image(encoded(random_image(40, 60), "JPEG", exif=exif))
    assert (loaded.height, loaded.width) == (40, 60)


def test_the_input_image_is_not_modified():
    image = random_image(mode="RGBA")
    before = np.asarray(image).copy()
    fetch_image({"image": image, "resized_height": 28, "resized_width": 28})
    np.testing.assert_array_equal(np.asarray(image), before)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (1092, 1932)),
        ({"resized_height": 280, "resized_width": 300}, (280, 308)),
        ({"max_pixels": 12544}, (84, 140)),
        ({"min_pixels": 5_000_000}, (1680, 2996)),
        # In the official packages, resized_height and resized_width take precedence over the pixel options.
        ({"resized_height": 280, "resized_width": 300, "max_pixels": 12544}, (280, 308)),
    ],
)
def test_options_of_a_part_set_the_size(options, size):
    resized = fetch_image({"type": "image", "image": Image.new("RGB", (1920, 1080)), **options})
    assert (resized.height, resized.width) == size


def test_the_editions_differ_in_the_largest_image_size():
    image = Image.new("RGB", (5600, 4200))
    for edition in EDITIONS.values():
        max_pixels = edition.image_pixel_limits[1]
        resized = fetch_image({"image": image}, edition=edition.name)
        assert max_pixels * 0.97 < resized.height * resized.width <= max_pixels


@pytest.mark.parametrize("option", ["resized_height", "resized_width", "min_pixels", "max_pixels"])
@pytest.mark.parametrize("value", [0, -28, "28", float("nan"), True])
def test_an_option_that_is_not_a_positive_number_is_named(option, value):
    part = {"image": random_image(), "resized_height": 28, "resized_width": 28, option: value}
    with pytest.raises(ValueError, match=f"{option} must be a positive number"):
        fetch_image(part)


def test_resized_height_needs_resized_width():
    with pytest.raises(ValueError, match="must be given together"):
        fetch_image({"image": random_image(), "resized_height": 28})


@pytest.mark.parametrize("edition", ["preview", "1.5"])
def test_image_url_parts_may_be_strings_or_dictionaries(edition):
    url = "data:image;base64," + base64.b64encode(encoded(random_image())).decode()
    parts = [{"type": "image_url", "image_url": url}, {"type": "image_url", "image_url": {"url": url}}]
    images = process_vision_info([{"role": "user", "content": parts}], edition=edition)[0]
    assert len(images) == 2
    np.testing.assert_array_equal(np.asarray(images[0]), np.asarray(images[1]))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png' does not exist; check the path"):
        load_image(tmp_path / "nowhere.png")


def test_a_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot read file"):
        load_image(str(tmp_path))


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_image_is_named(tmp_path, image_format):
    path = tmp_path / "half.bin"
    content = encoded(random_image(), image_format)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"half\.bin"):
        load_image(path)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_bytes_that_are_not_an_image_are_rejected(content):
    with pytest.raises(ValueError, match=f"<{len(content)} bytes>"):
        load_image(content)


def test_a_decompression_bomb_is_rejected_and_the_error_names_pillows_limit(monkeypatch, tmp_path):
    path = tmp_path / "bomb.png"
    random_image(100, 100).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"bomb\.png.*PIL\.Image\.MAX_IMAGE_PIXELS"):
        load_image(path)


def test_an_extreme_aspect_ratio_is_rejected():
    with pytest.raises(ValueError, match="200 times"):
        fetch_image({"image": Image.new("RGB", (100_000, 2))})


@pytest.mark.parametrize("source", ["data:image;base64,!!!!", "data:image/png,abc", "data:image;base64,QUJ"])
def test_an_invalid_data_url_is_rejected(source):
    with pytest.raises(ValueError, match="data URL"):
        load_image(source)


@pytest.mark.parametrize("source", [None, 3, {"url": "x"}, [1]])
def test_an_unsupported_type_is_rejected(source):
    with pytest.raises(TypeError, match=type(source).__name__):
        load_image(source)


def test_arrays_of_wrong_dtype_or_shape_are_rejected():
    with pytest.raises(TypeError, match="uint8, got float64"):
        load_image(np.zeros((4, 4, 3)))
    for shape in [(4,), (2, 4, 5), (0, 4, 3), (4, 4, 3, 3)]:
        with pytest.raises(ValueError, match=r"\[H, W\]"):
            load_image(np.zeros(shape, np.uint8))


def test_an_unknown_edition_is_rejected():
    with pytest.raises(ValueError, match="edition must be one of"):
        load_image(random_image(), edition="1_5")


def test_a_url_of_a_web_page_is_rejected(server):
    server.routes["/page"] = answer(b"<html></html>")
    with pytest.raises(ValueError, match=r"/page' is not in a format that Pillow can read"):
        load_image(server.address + "/page")
