"""Options of message parts, limits of downloads and the edition reach the functions that load images and videos."""

import base64
import io
import time

import numpy as np
import pytest
from PIL import Image

from keye_kernels.editions import EDITIONS
from keye_kernels.processing import process_vision_info, sources
from keye_kernels.processing.images import fetch_image, load_image
from keye_kernels.processing.sources import USER_AGENT, read_source
from tests.helpers.http_answers import answer
from tests.helpers.messages import random_image, user, user_videos
from tests.helpers.video_clips import encode_clip


def png(image):
    image.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("edition", EDITIONS)
def test_the_edition_decides_about_transparent_images_and_frames(edition):
    clear = Image.new("RGBA", (56, 56), (10, 20, 30, 0))
    expected = (255, 255, 255) if edition == "preview" else (10, 20, 30)
    assert fetch_image({"image": clear}, edition=edition).getpixel((0, 0)) == expected
    messages = user({"type": "image", "image": clear}, {"type": "video", "video": [clear] * 2})
    images, videos, *_ = process_vision_info(messages, edition=edition)
    assert images[0].getpixel((0, 0)) == expected
    frame = videos[0][0]
    assert (frame.getpixel((0, 0)) if edition == "preview" else tuple(frame[:, 0, 0].tolist())) == expected


def test_an_image_part_is_resized_bicubically():
    image = random_image(61, 75)
    expected = image.resize((84, 56), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(fetch_image({"image": image})), np.asarray(expected))


def test_a_part_needs_only_its_type_or_only_its_key(processor):
    data = "data:image/png;base64," + base64.b64encode(png(random_image())).decode()
    parts = [{"image": data}, {"image_url": data}, {"type": "image_url", "image_url": data}, {"type": "image", "image_url": data}]
    images, _, *_ = process_vision_info(user(*parts), edition=processor.edition)
    assert len(images) == 4
    for part in ({"type": "image"}, {"type": "image_url"}):
        with pytest.raises(ValueError, match="needs 'image' or 'image_url'"):
            process_vision_info(user(part), edition=processor.edition)


def test_base64_may_have_line_breaks_and_a_path_may_have_percent_signs(tmp_path):
    content = png(random_image())
    assert read_source("data:image/png;base64," + base64.encodebytes(content).decode()) == content
    (tmp_path / "100%25.png").write_bytes(content)
    (tmp_path / "100%.png").write_bytes(b"another")
    assert read_source(f"file://{tmp_path}/100%25.png") == content


def test_downloads_name_the_package_in_their_user_agent(server):
    seen = []
    server.routes["/a"] = lambda handler: (seen.append(handler.headers["User-Agent"]), answer(b"x")(handler))
    assert read_source(server.address + "/a") == b"x"
    assert seen == [USER_AGENT]


@pytest.mark.parametrize("edition", EDITIONS)
@pytest.mark.parametrize("kind", ["image", "video", "images of a video"])
def test_the_limits_of_a_download_reach_every_source(server, edition, kind):
    image = png(random_image())
    server.routes["/file"] = answer(image)
    server.routes["/slow"] = lambda handler: time.sleep(1)

    def load(path, **limits):
        url = server.address + path
        part = {"image": url} if kind == "image" else {"video": url if kind == "video" else [url, url]}
        process_vision_info(user(part), edition=edition, **limits)

    with pytest.raises(ValueError, match=f"larger than max_bytes={len(image) - 1}"):
        load("/file", max_bytes=len(image) - 1)
    with pytest.raises(ValueError, match=r"within timeout=0\.1 seconds"):
        load("/slow", timeout=0.1)
    with pytest.raises(ValueError, match=r"within timeout=0\.1 seconds"):
        load_image(server.address + "/slow", timeout=0.1)


@pytest.mark.parametrize(("kind", "timeout", "mebibytes"), [("image", 30, 256), ("video", 300, 4096)])
def test_the_default_limits_of_a_download(kind, timeout, mebibytes, monkeypatch):
    seen = []

    def download(url, file, **limits):
        seen.append(limits)
        raise ValueError("not downloaded")

    monkeypatch.setattr(sources, "download", download)
    with pytest.raises(ValueError, match="not downloaded"):
        process_vision_info(user({kind: "https://localhost/file"}))
    assert seen == [{"timeout": timeout, "max_bytes": mebibytes * 2**20}]


def test_parallel_loading_keeps_the_order_of_slow_and_fast_sources(server):
    sizes = [56, 84, 112, 140]

    def respond_after(seconds, content):
        return lambda handler: (time.sleep(seconds), answer(content)(handler))

    for index, size in enumerate(sizes):
        server.routes[f"/{size}"] = respond_after(0.2 * (len(sizes) - index), png(random_image(size, size)))
    messages = user(*({"image": f"{server.address}/{size}"} for size in sizes))
    assert [image.height for image in process_vision_info(messages, workers=4)[0]] == sizes


def test_options_of_a_list_of_images():
    gray, red = Image.new("RGB", (56, 56), (128, 128, 128)), Image.new("RGB", (56, 56), (230, 30, 40))
    assert process_vision_info(user_videos({"video": [gray] * 2}), True)[2] == {"fps": [2.0]}

    def options(video, **given):
        (times,), (types,) = (
            process_vision_info(user_videos({"video": video, **given}), edition="1.5")[2][name]
            for name in ("timestamps", "frame_types")
        )
        return types.tolist(), None if times is None else times.tolist()

    assert options([gray, red, red, gray], fps=2) == ([0, 0, 1, 0], [0.0, 0.5, 1.0, 1.5])
    assert options([gray, red, red, gray], min_frame_similarity=0)[0] == [0, 1, 1, 1]
    assert options([gray, red, red, gray], min_frame_similarity=1.1)[0] == [0, 0, 0, 0]
    assert options([gray] * 4, max_frames=2, fps=2) == ([0, 1], [0.0, 1.5])


def test_min_frame_similarity_of_a_file():
    clip = encode_clip(8, fps=2)
    for threshold, types in ((0, [0] + [1] * 7), (1.1, [0] * 8)):
        messages = user_videos({"video": clip, "min_frame_similarity": threshold})
        assert process_vision_info(messages, edition="1.5")[2]["frame_types"][0].tolist() == types
