"""Untrusted files and servers cannot open other files or sockets, and cannot use unlimited time or memory."""

import itertools
import os
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from PIL import Image

from keye_kernels.processing import templates, video_reader
from keye_kernels.processing.images import load_image
from keye_kernels.processing.prompts import render_chat_template
from keye_kernels.processing.sources import read_source
from keye_kernels.processing.videos import fetch_video
from tests.helpers.http_answers import answer
from tests.helpers.video_clips import encode_clip

TURN = [{"role": "user", "content": "x"}]
RTP_PORT = 45670
SDP = (
    f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {RTP_PORT} RTP/AVP 96\na=rtpmap:96 H264/90000\n"
).encode()


def test_an_sdp_file_opens_no_socket(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(SDP)
    for source in (SDP, path):
        failure = []

        def load(source=source, failure=failure):
            try:
                fetch_video({"video": source})
            except ValueError as error:
                failure.append(str(error))

        thread = threading.Thread(target=load, daemon=True)
        thread.start()
        while thread.is_alive():
            # Binding the port fails while FFmpeg has it open.
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
                udp.bind(("127.0.0.1", RTP_PORT))
            time.sleep(0.01)
        assert "not in a supported format" in failure[0]


def test_containers_outside_the_list_are_rejected(monkeypatch):
    content = encode_clip(5, container="mkv")
    fetch_video({"video": content})
    monkeypatch.setattr(video_reader, "CONTAINERS", ("mov", "mp4"))
    with pytest.raises(ValueError, match=r"not in a supported format \(mov, mp4\)"):
        fetch_video({"video": content})


@pytest.mark.parametrize(
    ("name", "limit", "message"),
    [("MAX_READ_SECONDS", 0.0, "took longer than 0.0 seconds"), ("MAX_PACKETS", 39, "more than 39 packets")],
)
def test_reading_a_video_is_limited(monkeypatch, name, limit, message):
    content = encode_clip(40)
    monkeypatch.setattr(video_reader, name, limit)
    with pytest.raises(ValueError, match=message):
        fetch_video({"video": content})


def test_streams_of_a_video_are_limited(monkeypatch):
    monkeypatch.setattr(video_reader, "MAX_STREAMS", 0)
    with pytest.raises(ValueError, match="cannot be opened"):
        fetch_video({"video": encode_clip(5)})


def test_frames_that_grow_within_a_video_are_rejected(monkeypatch):
    # Two H.264 streams of different sizes, one after the other.
    small, large = (encode_clip(count, container="h264", height=size, width=size) for count, size in ((600, 64), (4, 512)))
    fetch_video({"video": small + large, "nframes": 604, "max_pixels": 784})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64)
    with pytest.raises(ValueError, match="damaged or truncated"):
        fetch_video({"video": small + large, "nframes": 604, "max_pixels": 784})


def test_postscript_is_not_run(tmp_path):
    path = tmp_path / "image.png"
    Image.new("RGB", (8, 8)).save(path, "EPS")
    with pytest.raises(ValueError, match="EPS"):
        load_image(path)


@pytest.mark.parametrize("load", [load_image, lambda path: fetch_video({"video": path})], ids=["image", "video"])
def test_files_that_are_not_regular_are_rejected(tmp_path, load):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", "/dev/zero", f"file://{tmp_path}/fifo"):
        with pytest.raises(ValueError, match="not a regular file"):
            load(path)


def test_a_local_image_file_is_limited(tmp_path):
    (tmp_path / "large.png").write_bytes(bytes(2000))
    with pytest.raises(ValueError, match=r"large\.png' is larger than max_bytes=1000"):
        load_image(tmp_path / "large.png", max_bytes=1000)


def send_slowly(handler, head):
    try:
        handler.wfile.write(head)
        for _ in range(60):
            handler.wfile.write(b"X-A: b\r\n")
            time.sleep(0.05)
    except OSError:
        handler.close_connection = True


def redirect_slowly(handler):
    time.sleep(0.15)
    answer(b"", 302, Location=f"{handler.path}x")(handler)


@pytest.mark.parametrize("case", ["header", "redirects"])
def test_the_time_limit_covers_the_whole_download(server, case):
    for count in range(10):
        server.routes["/a" + "x" * count] = redirect_slowly
    server.routes["/header"] = lambda handler: send_slowly(handler, b"HTTP/1.1 200 OK\r\n")
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"within timeout=0\.4 seconds"):
        read_source(server.address + ("/header" if case == "header" else "/a"), timeout=0.4)
    assert time.monotonic() - start < 2
    deadline = time.monotonic() + 5
    while any("download" in thread.name for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any("download" in thread.name for thread in threading.enumerate())


@pytest.mark.parametrize("limits", [{"timeout": float("nan")}, {"timeout": 0}, {"timeout": "1"}, {"max_bytes": 0}], ids=str)
def test_senseless_limits_are_rejected(server, limits):
    server.routes["/a"] = answer(b"content")
    with pytest.raises(ValueError, match=f"{next(iter(limits))} must be a positive"):
        read_source(server.address + "/a", **limits)


def test_schemes_of_urls_may_be_upper_case(server):
    server.routes["/a"] = answer(b"content")
    assert read_source(server.address.replace("http", "HTTP") + "/a") == b"content"


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(9999) %}{{ range(99999) | list | length }}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
        "{{ 'x' * 10**12 }}",
        "{{ [1] * 10**12 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ '%0999999999d' % 1 }}",
        "{% set ns = namespace(s='xx') %}{% for a in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(s='xx') %}{% for a in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{{ range(10**9) }}",
        "{{ lipsum(n=10**6) }}",
        "{{ 'x'.ljust(10**10) }}",
        "{{ '{:>9999999}'.format('x') }}",
        "{{ '{0:{1}}'.format('x', 10**7) }}",
        "{{ '%9999999d' | format(1) }}",
        "{{ ('x' * 9999999).replace('x', 'y' * 9999) }}",
        "{{ ('x' * 9999999) | replace('x', 'y' * 9999) }}",
        "{{ ('x' * 9999).join('y' * 99999) }}",
        "{{ ('y' * 99999) | join('x' * 9999) }}",
        "{{ ('x\n' * 99999) | indent(9999) }}",
        "{{ ('x' * 9999999) | list | sort }}",
        "{{ 3 | round(-10**9) }}",
        "{% set ns = namespace(a=[]) %}{% for i in range(9999) %}{% set ns.a = ns.a + ['x' * 9999999] %}{% endfor %}",
        *(
            "{% set ns = namespace(a=[1]) %}{% for i in range(99) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ " + end + " }}"
            for end in (
                "ns.a",
                "ns.a | string",
                "ns.a | tojson",
                "'%s' % [ns.a]",
                "'{}'.format(ns.a)",
                "'' ~ ns.a",
                "ns.a | join",
            )
        ),
        "{% for a in range(999) %}{{ ('ab' * 2499999) | upper | lower }}{% endfor %}",
    ],
)
def test_templates_are_limited(template):
    start = time.monotonic()
    with pytest.raises(ValueError, match="the chat template failed"):
        render_chat_template(template, TURN)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "template", ["{{ 1 + 'a' }}", "{{ 1 / 0 }}", "{{ messages[0].content.missing.x }}", "{{ [] | first.x }}"]
)
def test_templates_that_raise_give_one_error(template):
    with pytest.raises(ValueError, match="the chat template"):
        render_chat_template(template, TURN)


@pytest.mark.parametrize("name", ["batch", "center", "pprint", "slice", "urlize", "wordwrap", "xmlattr"])
def test_filters_that_chat_templates_do_not_need_are_missing(name):
    with pytest.raises(ValueError, match=f"No filter named '{name}'"):
        render_chat_template("{{ 'x' | " + name + " }}", TURN)


def test_the_time_of_a_template_is_limited(monkeypatch):
    """A clock that advances one second each time it is read, so that the speed of the machine does not matter."""
    seconds = itertools.count()
    monkeypatch.setattr(templates, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    template = "{% for a in range(9999) %}{{ messages | tojson }}{% endfor %}"
    with pytest.raises(ValueError, match=r"longer than 5\.0 seconds"):
        render_chat_template(template, TURN)
    assert next(seconds) == 7  # read at the start, and at each step until more than 5 seconds have passed
    monkeypatch.setattr(templates, "time", SimpleNamespace(monotonic=lambda: 0.0))
    assert render_chat_template(template, TURN).count("role") == 9999


def test_limited_filters_and_methods_do_what_those_of_jinja_do():
    template = """{{ [1, 'a', none] | join('-') }} {{ [{'n': 1}, {'n': 2}] | join(', ', attribute='n') }} {{ ['a'] | join }}
{{- 'a-b-c'.replace('-', '+', 1) }} {{ 'a-b-c' | replace('-', '+') }} {{ ', '.join(['x', 'y']) }} {{ '%s=%05d' | format('a', 3) }}
{{- ' {}:{:>4}'.format(1, 'x') }} {{ 'a\nb' | indent(2) }} {{ 'a\n\nb' | indent('> ', true, true) }} {{ [{'a': 2}] | string }}
{{- 1234567890123 | string }} {{ 2.567 | round(1) }} {{ 1234567890123 | tojson }}"""
    expected = "1-a-None 1, 2 aa+b-c a+b+c x, y a=00003 1:   x a\n  b > a\n> \n> b [{'a': 2}]1234567890123 2.6 1234567890123"
    assert render_chat_template(template, TURN) == expected


def test_limits_leave_room_for_long_conversations():
    turns = [{"role": "user", "content": [{"type": "text", "text": "word " * 100}] * 10} for _ in range(1000)]
    template = (
        "{% for m in messages %}{% for p in m.content %}{{ loop.index }}{{ p.text }}{% endfor %}{{ loop.last }}{% endfor %}"
    )
    assert len(render_chat_template(template, turns)) > 5_000_000
