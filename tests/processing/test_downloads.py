"""Downloads over HTTP: redirects, errors, and the limits of time and size."""

import re
import time

import pytest

from keye_kernels.processing.sources import MAX_REDIRECTS, read_source
from tests.helpers.http_answers import answer, answer_endlessly


def test_redirects_to_http_are_followed(server):
    server.routes["/a"] = answer(b"", 302, Location="/b")
    server.routes["/b"] = answer(b"content")
    assert read_source(server.address + "/a") == b"content"


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:text/plain,x"])
def test_redirects_to_other_schemes_are_rejected(server, target):
    server.routes["/a"] = answer(b"", 302, Location=target)
    with pytest.raises(ValueError, match=rf"[Rr]edirect.*{re.escape(target)}"):
        read_source(server.address + "/a")


def test_the_number_of_redirects_is_limited(server):
    for count in range(MAX_REDIRECTS + 1):
        server.routes[f"/{count}"] = answer(b"", 302, Location=f"/{count + 1}")
    server.routes[f"/{MAX_REDIRECTS + 1}"] = answer(b"content")
    assert read_source(server.address + "/1") == b"content"
    with pytest.raises(ValueError, match="cannot download"):
        read_source(server.address + "/0")


def test_an_http_error_is_named(server):
    server.routes["/a"] = answer(b"", 404)
    with pytest.raises(ValueError, match=r"/a': the server answered 404"):
        read_source(server.address + "/a")


def test_an_unreachable_server_is_named():
    with pytest.raises(ValueError, match=r"cannot download 'http://127\.0\.0\.1:9/x'"):
        read_source("http://127.0.0.1:9/x", timeout=2)


@pytest.mark.parametrize("url", ["http://", "http://[1", "http://a b/x", "http://127.0.0.1:99999/x"])
def test_an_invalid_url_is_named(url):
    with pytest.raises(ValueError, match=re.escape(f"cannot download {url!r}")):
        read_source(url, timeout=2)


def test_a_download_that_ends_early_is_rejected(server):
    server.routes["/a"] = answer(b"half", **{"Content-Length": "8"})
    with pytest.raises(ValueError, match="ended 4 bytes early"):
        read_source(server.address + "/a")


def test_the_size_limit_stops_an_endless_download(server):
    server.routes["/a"] = answer_endlessly(bytes(65536))
    with pytest.raises(ValueError, match="larger than max_bytes=1000000"):
        read_source(server.address + "/a", max_bytes=1_000_000)


def test_the_time_limit_stops_an_endless_slow_download(server):
    server.routes["/a"] = answer_endlessly(b"x", pause=0.05)
    with pytest.raises(ValueError, match=r"within timeout=0\.3 seconds"):
        read_source(server.address + "/a", timeout=0.3)


def test_the_time_limit_applies_to_a_server_that_does_not_answer(server):
    server.routes["/a"] = lambda handler: time.sleep(1)
    with pytest.raises(ValueError, match=r"within timeout=0\.2 seconds"):
        read_source(server.address + "/a", timeout=0.2)
