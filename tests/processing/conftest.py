"""Processors of both editions with a byte tokenizer, and a local HTTP server."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from keye_kernels.editions import EDITIONS
from keye_kernels.processing import KeyeProcessor
from tests.helpers.small_tokenizer import write_processor_files


@pytest.fixture(scope="session")
def processors(tmp_path_factory):
    """The processor of each edition, by its name."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {edition: KeyeProcessor.from_pretrained(write_processor_files(folder / edition, edition)) for edition in EDITIONS}


@pytest.fixture(params=EDITIONS)
def processor(request, processors):
    return processors[request.param]


@pytest.fixture
def preview(processors):
    return processors["preview"]


@pytest.fixture
def v1_5(processors):
    return processors["1.5"]


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.routes[self.path](self)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """A local HTTP server at `address`; `routes` maps paths to functions of the request handler."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as http:
        http.daemon_threads = True
        http.routes = {}
        http.address = f"http://127.0.0.1:{http.server_port}"
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield http
        http.shutdown()
