"""Pictures from every kind of source, their patches, and clear errors for bad ones."""

import base64
import io
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from keye_kernels.editions import EDITIONS
from keye_kernels.processing import process_vision_info
from keye_kernels.processing.images import fetch_image, load_image
from keye_kernels.processing.patches import PatchConfig, to_frame_array, to_frame_tensors
from keye_kernels.processing.sources import read_source
from tests.helpers.golden import load_golden
from tests.helpers.http_answers import answer

# The golden pixels are float32; x * (1 / 255) and x / 255 differ by one rounding.
PIXEL_ATOL = 1e-6


def picture(height=40, width=60, mode="RGB", seed=0):
    channels = {"RGB": 3, "RGBA": 4}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image, image_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.routes[self.path](self)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """A local http server; ``routes`` maps paths to functions of the request handler."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as http:
        http.daemon_threads = True
        http.routes = {}
        http.address = f"http://127.0.0.1:{http.server_port}"
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield http
        http.shutdown()


# ---------------------------------------------------------------------------------------------------------- sources


def test_every_source_gives_the_same_picture(tmp_path, server):
    image = picture()
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
    image = picture().convert(mode)
    np.testing.assert_array_equal(np.asarray(load_image(image)), np.asarray(image.convert("RGB")))


def test_the_exif_orientation_tag_is_ignored_as_in_the_official_packages():
    exif = Image.Exif()
    exif[0x0112] = 6
    loaded = load_image(encoded(picture(40, 60), "JPEG", exif=exif))
    assert (loaded.height, loaded.width) == (40, 60)


def test_the_callers_picture_is_not_changed():
    image = picture(mode="RGBA")
    before = np.asarray(image).copy()
    fetch_image({"image": image, "resized_height": 28, "resized_width": 28})
    np.testing.assert_array_equal(np.asarray(image), before)


# ---------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (1092, 1932)),
        ({"resized_height": 280, "resized_width": 300}, (280, 308)),
        ({"max_pixels": 12544}, (84, 140)),
        ({"min_pixels": 5_000_000}, (1680, 2996)),
        # The official packages let resized_height and resized_width win over the pixel options.
        ({"resized_height": 280, "resized_width": 300, "max_pixels": 12544}, (280, 308)),
    ],
)
def test_options_of_a_part_set_the_size(options, size):
    resized = fetch_image({"type": "image", "image": Image.new("RGB", (1920, 1080)), **options})
    assert (resized.height, resized.width) == size


def test_the_editions_differ_in_the_largest_picture():
    image = Image.new("RGB", (5600, 4200))
    for edition in EDITIONS.values():
        max_pixels = edition.image_pixel_limits[1]
        resized = fetch_image({"image": image}, edition=edition.name)
        assert max_pixels * 0.97 < resized.height * resized.width <= max_pixels


@pytest.mark.parametrize("option", ["resized_height", "resized_width", "min_pixels", "max_pixels"])
@pytest.mark.parametrize("value", [0, -28, "28", float("nan"), True])
def test_an_option_that_is_no_positive_number_is_named(option, value):
    part = {"image": picture(), "resized_height": 28, "resized_width": 28, option: value}
    with pytest.raises(ValueError, match=f"{option} must be a positive number"):
        fetch_image(part)


def test_resized_height_needs_resized_width():
    with pytest.raises(ValueError, match="must be given together"):
        fetch_image({"image": picture(), "resized_height": 28})


@pytest.mark.parametrize("edition", ["preview", "1.5"])
def test_image_url_parts_may_be_strings_or_dictionaries(edition):
    url = "data:image;base64," + base64.b64encode(encoded(picture())).decode()
    parts = [{"type": "image_url", "image_url": url}, {"type": "image_url", "image_url": {"url": url}}]
    images = process_vision_info([{"role": "user", "content": parts}], edition=edition)[0]
    assert len(images) == 2
    np.testing.assert_array_equal(np.asarray(images[0]), np.asarray(images[1]))


# ----------------------------------------------------------------------------------------------------------- errors


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png' does not exist; check the path"):
        load_image(tmp_path / "nowhere.png")


def test_a_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot read file"):
        load_image(str(tmp_path))


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_picture_is_named(tmp_path, image_format):
    path = tmp_path / "half.bin"
    content = encoded(picture(), image_format)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"half\.bin"):
        load_image(path)


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_picture_is_refused(content):
    with pytest.raises(ValueError, match=f"<{len(content)} bytes>"):
        load_image(content)


def test_a_decompression_bomb_is_refused_and_pillows_limit_named(monkeypatch, tmp_path):
    path = tmp_path / "bomb.png"
    picture(100, 100).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"bomb\.png.*PIL\.Image\.MAX_IMAGE_PIXELS"):
        load_image(path)


def test_a_picture_two_pixels_high_and_100000_wide_is_refused():
    with pytest.raises(ValueError, match="200 times"):
        fetch_image({"image": Image.new("RGB", (100_000, 2))})


@pytest.mark.parametrize("source", ["data:image;base64,!!!!", "data:image/png,abc", "data:image;base64,QUJ"])
def test_a_broken_data_address_is_refused(source):
    with pytest.raises(ValueError, match="data URL"):
        load_image(source)


@pytest.mark.parametrize("source", [None, 3, {"url": "x"}, [1]])
def test_another_type_is_refused(source):
    with pytest.raises(TypeError, match=type(source).__name__):
        load_image(source)


def test_arrays_of_another_type_or_shape_are_refused():
    with pytest.raises(TypeError, match="uint8, got float64"):
        load_image(np.zeros((4, 4, 3)))
    for shape in [(4, 4), (3, 4, 5), (0, 4, 3), (4, 4, 3, 3)]:
        with pytest.raises(ValueError, match=r"\[H, W, 3\]"):
            load_image(np.zeros(shape, np.uint8))


def test_an_unknown_edition_is_refused():
    with pytest.raises(ValueError, match="edition must be one of"):
        load_image(picture(), edition="1_5")


# --------------------------------------------------------------------------------------------------------- downloads


def test_redirects_to_http_are_followed(server):
    server.routes["/a"] = answer(b"", 302, Location="/b")
    server.routes["/b"] = answer(b"content")
    assert read_source(server.address + "/a") == b"content"


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:text/plain,x"])
def test_redirects_elsewhere_are_refused(server, target):
    server.routes["/a"] = answer(b"", 302, Location=target)
    with pytest.raises(ValueError, match=rf"[Rr]edirect.*{re.escape(target)}"):
        read_source(server.address + "/a")


def test_an_http_error_is_named(server):
    server.routes["/a"] = answer(b"", 404)
    with pytest.raises(ValueError, match=r"/a': the server answered 404"):
        read_source(server.address + "/a")


def test_a_page_behind_an_image_address_is_refused(server):
    server.routes["/page"] = answer(b"<html></html>")
    with pytest.raises(ValueError, match=r"/page' is not in a format that Pillow can read"):
        load_image(server.address + "/page")


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"cannot download 'http://127\.0\.0\.1:9/x'"):
        read_source("http://127.0.0.1:9/x", timeout=2)


@pytest.mark.parametrize("url", ["http://", "http://[1", "http://a b/x", "http://127.0.0.1:99999/x"])
def test_an_address_that_is_none_is_named(url):
    with pytest.raises(ValueError, match=re.escape(f"cannot download {url!r}")):
        read_source(url, timeout=2)


def test_a_download_that_ends_early_is_refused(server):
    server.routes["/a"] = answer(b"half", **{"Content-Length": "8"})
    with pytest.raises(ValueError, match="ended 4 bytes early"):
        read_source(server.address + "/a")


def _endless(pause, chunk):
    def respond(handler):
        handler.send_response(200)
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(chunk)
                time.sleep(pause)
        except OSError:
            pass

    return respond


def test_an_endless_download_meets_the_size_limit(server):
    server.routes["/a"] = _endless(0, bytes(65536))
    with pytest.raises(ValueError, match="larger than max_bytes=1000000"):
        read_source(server.address + "/a", max_bytes=1_000_000)


def test_an_endless_drip_meets_the_time_limit(server):
    server.routes["/a"] = _endless(0.05, b"x")
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"within timeout=0\.3 seconds"):
        read_source(server.address + "/a", timeout=0.3)
    assert time.monotonic() - start < 3


def test_a_silent_server_meets_the_time_limit(server):
    server.routes["/a"] = lambda handler: time.sleep(1)
    with pytest.raises(ValueError, match=r"within timeout=0\.2 seconds"):
        read_source(server.address + "/a", timeout=0.2)


# ----------------------------------------------------------------------------------------------------------- patches


@pytest.mark.parametrize("name", ["image0", "image1", "image2", "video0"])
def test_patches_equal_the_official_ones(name):
    tensors = load_golden("preview", "image_processing.safetensors")
    frames = tensors[f"{name}.uint8"].numpy()
    patches, grid = PatchConfig().frames_to_patches(frames if name == "video0" else [frames])
    grids = tensors[f"{name}.video_grid_thw" if name == "video0" else f"{name}.image_grid_thw"]
    assert [list(grid)] == grids.tolist()
    torch.testing.assert_close(
        PatchConfig().normalize(patches), tensors[f"{name}.pixel_values"], atol=PIXEL_ATOL, rtol=0
    )


def test_the_first_frame_decides_the_size_of_a_video():
    frames = [np.zeros((56, 84, 3), np.uint8), np.zeros((140, 28, 3), np.uint8)]
    patches, grid = PatchConfig().frames_to_patches(frames)
    assert grid == (2, 4, 6)
    assert patches.shape == (48, 3, 14, 14)


def test_patches_are_row_major_and_channels_first():
    config = PatchConfig()
    frame = torch.randint(0, 256, (3, 28, 56), dtype=torch.uint8)
    patches = config.normalize(config.patchify(frame))
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
    pixels = config.normalize(config.patchify(torch.full((3, 28, 28), 255, dtype=torch.uint8)))
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([0.9, 0.4, 0.7 / 3]))
    assert PatchConfig.from_dict({}, "1.5").resample == Image.Resampling.BILINEAR
    assert PatchConfig.from_dict({"resample": 0}, "1.5").resample == 0
    assert PatchConfig.from_dict({"size": {"shortest_edge": 784, "longest_edge": 7840}}, "1.5").max_pixels == 7840


@pytest.mark.parametrize("config", [{"temporal_patch_size": 2}, {"image_mean": [0.5]}])
def test_a_configuration_the_model_cannot_take_is_refused(config):
    with pytest.raises(ValueError, match=next(iter(config))):
        PatchConfig.from_dict(config, "preview")


def test_images_and_videos_may_be_tensors_or_arrays():
    frames = torch.randint(0, 256, (2, 3, 8, 10), dtype=torch.uint8)
    arrays = frames.permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(to_frame_array(frames[0], "preview"), arrays[0])
    for video in (frames, frames.float(), arrays, list(arrays), [Image.fromarray(array) for array in arrays]):
        torch.testing.assert_close(torch.stack(to_frame_tensors(video, "preview")), frames)


@pytest.mark.parametrize(
    ("video", "error", "message"),
    [
        (torch.zeros(0, 3, 4, 4), ValueError, "at least one frame"),
        ([], ValueError, "at least one frame"),
        (torch.zeros(2, 4, 4, 3), ValueError, r"\[T, 3, H, W\]"),
        (np.zeros((4, 4, 3), np.uint8), ValueError, r"\[T, H, W, 3\]"),
        (torch.full((1, 3, 4, 4), 300.0), ValueError, "0 to 255"),
        (torch.full((1, 3, 4, 4), 0.3), ValueError, "multiply them by 255"),
        (torch.full((1, 3, 4, 4), float("nan")), ValueError, "0 to 255"),
        ("clip.mp4", TypeError, "process_vision_info"),
    ],
)
def test_what_is_no_video_is_refused(video, error, message):
    with pytest.raises(error, match=message):
        to_frame_tensors(video, "preview")
