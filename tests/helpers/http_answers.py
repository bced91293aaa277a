"""The local HTTP servers that tests download from, and their responses."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def answer(content, status=200, **headers):
    """Returns a function that responds to a request with `content`."""

    def respond(handler):
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    return respond


def answer_endlessly(chunk, pause=0.0):
    """Returns a function that responds to a request with `chunk` repeated without end, `pause` seconds apart."""

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


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.routes[self.path](self)

    def log_message(self, *_):
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


@contextmanager
def http_server() -> Iterator[ThreadingHTTPServer]:
    """A local HTTP server at `address`; `routes` maps paths to functions of the request handler."""
    with _Server(("127.0.0.1", 0), _Handler) as http:
        http.routes = {}
        http.address = f"http://127.0.0.1:{http.server_port}"
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield http
        http.shutdown()
