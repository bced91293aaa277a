"""Values exactly at a limit: sizes of images, pixel budgets, bytes of files, steps of templates."""

import io
import math
import time

import numpy as np
import pytest
import torch
from jinja2 import TemplateError
from PIL import Image

from keye_kernels.editions import EDITIONS
from keye_kernels.processing import templates
from keye_kernels.processing.images import fetch_image, load_image
from keye_kernels.processing.patches import PatchConfig, to_uint8
from keye_kernels.processing.prompts import render_chat_template
from keye_kernels.processing.resize import smart_resize, smart_resize_processor
from keye_kernels.processing.sources import read_source
from tests.helpers.http_answers import answer
from tests.helpers.messages import random_image

TURN = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize("resize", [smart_resize, smart_resize_processor])
def test_an_area_equal_to_a_limit_is_kept(resize):
    # 40 x 60 is rounded to 28 x 56, an area of 1568 pixels.
    assert resize(40, 60, min_pixels=1568, max_pixels=1568) == (28, 56)
    assert resize(40, 60, min_pixels=784, max_pixels=1567) == (28, 28)
    assert resize(40, 60, min_pixels=1569, max_pixels=10**6) == (56, 56)


@pytest.mark.parametrize("resize", [smart_resize, smart_resize_processor])
def test_an_aspect_ratio_of_exactly_200_is_accepted(resize):
    assert resize(28, 5600, min_pixels=784, max_pixels=10**6) == (28, 5600)
    with pytest.raises(ValueError, match="200 times"):
        resize(28, 5601, min_pixels=784, max_pixels=10**6)


def test_an_enlarged_side_is_rounded_to_whole_pixels_first():
    # 68 * 28 / 27 = 70.5 is rounded to 71, which is nearer to 84 than to 56.
    assert smart_resize_processor(27, 68, min_pixels=784, max_pixels=10**6) == (28, 84)
    assert smart_resize_processor(68, 27, min_pixels=784, max_pixels=10**6) == (84, 28)


@pytest.mark.parametrize("edition", EDITIONS.values(), ids=EDITIONS)
def test_given_sizes_are_limited_by_the_edition(edition):
    small = fetch_image({"image": random_image(), "resized_height": 28, "resized_width": 28}, edition=edition.name)
    assert small.size == (56, 56)
    large = fetch_image({"image": random_image(), "resized_height": 9000, "resized_width": 9000}, edition=edition.name)
    # The square of the largest multiple of 28 whose area is within the limit
    assert large.size == {"preview": (3584, 3584), "1.5": (4004, 4004)}[edition.name]


def test_equal_limits_of_the_area_are_accepted():
    part = {"image": random_image(100, 100), "min_pixels": 3136, "max_pixels": 3136}
    assert fetch_image(part).size == (56, 56)
    assert PatchConfig(min_pixels=3136, max_pixels=3136).resized_size(100, 100) == (56, 56)


def test_the_largest_number_of_a_resize_filter_is_accepted():
    assert PatchConfig(resample=5).resample == Image.Resampling.HAMMING


def test_16_bit_gray_is_rounded_to_the_nearest_8_bit_value():
    values = np.array([[0, 128, 129, 257 * 9 + 129, 65535 - 129, 65535]], dtype=np.uint16)
    assert np.asarray(load_image(Image.fromarray(values)))[0, :, 0].tolist() == [0, 0, 1, 10, 254, 255]


def test_floating_point_pixels_are_rounded_and_may_be_255():
    pixels = torch.tensor([0.0, 1.4, 1.6, 254.6, 255.0])
    assert to_uint8(pixels, "pixels").tolist() == [0, 1, 2, 255, 255]
    for outside in (-0.1, 255.1):
        with pytest.raises(ValueError, match="from 0 to 255"):
            to_uint8(torch.tensor([outside, 2.0]), "pixels")


def test_a_source_of_exactly_max_bytes_is_read(tmp_path, server):
    (tmp_path / "file").write_bytes(b"12345")
    server.routes["/file"] = answer(b"12345")
    for source in (tmp_path / "file", server.address + "/file", b"12345"):
        assert read_source(source, max_bytes=5) == b"12345"
        with pytest.raises(ValueError, match="larger than max_bytes=4"):
            read_source(source, max_bytes=4)


def test_a_download_of_unknown_length_is_read_up_to_one_byte_more_than_max_bytes(server):
    """Without a Content-Length, only that byte shows that the file is larger."""

    def respond(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(b"1234")
        time.sleep(0.1)
        handler.wfile.write(b"5")

    server.routes["/file"] = respond
    assert read_source(server.address + "/file", max_bytes=5) == b"12345"
    with pytest.raises(ValueError, match="larger than max_bytes=4"):
        read_source(server.address + "/file", max_bytes=4)


@pytest.mark.parametrize(
    ("name", "limit", "template"),
    [
        ("MAX_LENGTH", 6, "abc{{ 'def' }}"),
        ("MAX_LENGTH", 5, "{{ messages[0].role }}{{ messages[0].content }}"),
        ("MAX_LENGTH", 6, "{{ 'abc' ~ 'def' }}"),
        ("MAX_LENGTH", 5, "{{ messages[0].role ~ messages[0].content }}"),
        ("MAX_LENGTH", 6, "{{ ('abc' + 'def')[0] }}"),
        ("MAX_LENGTH", 6, "{{ ('ab' * 3)[0] }}"),
        ("MAX_LENGTH", 6, "{{ (3 * [1, 2]) | length }}"),
        ("MAX_INTEGER_BITS", 8, "{{ 15 * 15 }}"),
        ("MAX_INTEGER_BITS", 8, "{{ 3 ** 4 }}"),
    ],
)
def test_a_template_may_reach_each_limit_and_not_exceed_it(monkeypatch, name, limit, template):
    monkeypatch.setattr(templates, name, limit)
    assert render_chat_template(template, TURN)
    monkeypatch.setattr(templates, name, limit - 1)
    with pytest.raises(ValueError, match="the chat template failed"):
        render_chat_template(template, TURN)


def test_a_template_may_take_exactly_its_steps(monkeypatch):
    token = templates._steps_left.set([2, math.inf])
    try:
        templates._count_steps(2)
        with pytest.raises(TemplateError, match="more than"):
            templates._count_steps(1)
    finally:
        templates._steps_left.reset(token)

    def needed_steps(items):
        for limit in range(100):
            monkeypatch.setattr(templates, "MAX_STEPS", limit)
            try:
                render_chat_template("{% for item in " + str(items) + " %}{% endfor %}x", TURN)
            except ValueError:
                continue
            return limit

    assert needed_steps([1, 2, 3]) == needed_steps([1, 2]) + 1


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_may_have_exactly_pillows_number_of_pixels(monkeypatch):
    buffer = io.BytesIO()
    random_image(10, 10).save(buffer, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    assert load_image(buffer.getvalue()).size == (10, 10)
