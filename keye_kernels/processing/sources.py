"""Reads images and videos from paths, URLs, base64 strings and bytes, within limits of time and size."""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import math
import os
import socket
import stat
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

DOWNLOAD_TIMEOUT_SECONDS = 30.0
MAX_DOWNLOAD_BYTES = 256 * 1024 * 1024
DOWNLOAD_CHUNK_BYTES = 1 << 20
MAX_REDIRECTS = 10
USER_AGENT = "keye_kernels"


def describe_source(source: Any) -> str:
    """Short name of a source for error messages."""
    if isinstance(source, (str, Path)):
        text = str(source)
        return repr(text if len(text) <= 120 else text[:60] + "...")
    if isinstance(source, (bytes, bytearray)):
        return f"<{len(source)} bytes>"
    return f"<{type(source).__name__}>"


@contextmanager
def open_source(
    source: Any, *, timeout: float = DOWNLOAD_TIMEOUT_SECONDS, max_bytes: int = MAX_DOWNLOAD_BYTES
) -> Iterator[BinaryIO]:
    """Opens a source as a seekable binary file and closes it at the end. Downloads go to a temporary file.

    A source is a path, `file://` or `http(s)://` URL, `data:...;base64,` string, or bytes. `timeout`, in seconds, and `max_bytes`
    limit downloads. A path must be that of a regular file. Raises FileNotFoundError, ValueError for a source that cannot be read
    (the message names it), or TypeError.
    """
    if isinstance(source, (bytes, bytearray)):
        with io.BytesIO(source) as file:
            yield file
    elif isinstance(source, str) and source.startswith("data:"):
        with io.BytesIO(_decode_base64(source)) as file:
            yield file
    elif _is_http(source):
        with tempfile.TemporaryFile() as file:
            download(source, file, timeout=timeout, max_bytes=max_bytes)
            file.seek(0)
            yield file
    else:
        with _open_file(source) as file:
            yield file


def read_source(source: Any, *, timeout: float = DOWNLOAD_TIMEOUT_SECONDS, max_bytes: int = MAX_DOWNLOAD_BYTES) -> bytes:
    """Returns the bytes of a source; arguments and errors as for `open_source`. `max_bytes` also limits local files."""
    if _is_http(source):
        downloaded = io.BytesIO()
        download(source, downloaded, timeout=timeout, max_bytes=max_bytes)
        return downloaded.getvalue()
    with open_source(source) as file:
        content = file.read(int(max_bytes) + 1)
    if len(content) > max_bytes:
        raise _too_large(describe_source(source), max_bytes)
    return content


def download(url: str, file: BinaryIO, *, timeout: float, max_bytes: int) -> None:
    """Downloads a URL into a file that is open for writing. `timeout` limits the whole download, in seconds.

    Raises ValueError if the URL cannot be read within the limits.
    """
    for limit, value in (("timeout", timeout), ("max_bytes", max_bytes)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{limit} must be a positive number, got {value!r}")
    name = describe_source(url)
    deadline = time.monotonic() + timeout
    connections: list[socket.socket] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            _download(url, file, _recording_opener(connections, deadline), timeout, deadline, max_bytes)
        except Exception as error:  # raised again by the waiting thread
            errors.append(error)

    # The timeout of a socket limits each receive only, and name resolution has none. So a thread downloads and this one waits.
    worker = threading.Thread(target=work, name=f"download {name}", daemon=True)
    worker.start()
    try:
        worker.join(min(timeout, threading.TIMEOUT_MAX))
        if worker.is_alive():
            raise ValueError(f"{name} did not arrive within timeout={timeout} seconds")
    finally:
        # Ends the receive that the thread waits for.
        for connection in connections:
            with suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
    if errors:
        raise errors[0]


def _download(
    url: str, file: BinaryIO, opener: urllib.request.OpenerDirector, timeout: float, deadline: float, max_bytes: int
) -> None:
    name, size = describe_source(url), 0
    try:
        request = urllib.request.Request(url, headers={"User-Agent": USER_AGENT})
        with opener.open(request, timeout=timeout) as response:
            # read1 returns after one receive; a plain read of a slow server would run past the deadline.
            while size <= max_bytes and (chunk := response.read1(DOWNLOAD_CHUNK_BYTES)):
                file.write(chunk)
                size += len(chunk)
                if time.monotonic() > deadline:
                    raise TimeoutError
            missing = response.length
    except urllib.error.HTTPError as error:
        error.close()
        raise ValueError(f"cannot download {name}: the server answered {error.code} {error.reason}") from error
    except Exception as error:  # of sockets, TLS, HTTP parsing and file systems
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise ValueError(f"{name} did not arrive within timeout={timeout} seconds") from error
        raise ValueError(f"cannot download {name}: {reason or type(reason).__name__}") from error
    if size > max_bytes:
        raise _too_large(name, max_bytes)
    if missing:
        raise ValueError(f"cannot download {name}: the connection ended {missing} bytes early; try again")


class _HttpRedirectsOnly(urllib.request.HTTPRedirectHandler):
    max_redirections = MAX_REDIRECTS

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str) -> Any:
        # A server must not be able to make the client read its own local files.
        if not _is_http(newurl):
            raise urllib.error.URLError(f"it redirects to {newurl!r}, and only http and https are followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _recording_opener(connections: list[socket.socket], deadline: float) -> urllib.request.OpenerDirector:
    """Returns an opener for http and https that appends each socket to `connections` and uses none after the deadline."""

    class Recording:
        timeout: Any

        def connect(self: Any) -> None:
            # A small positive number, because 0 would make the socket non-blocking.
            self.timeout = max(deadline - time.monotonic(), 1e-3)
            super().connect()  # type: ignore[misc]
            connections.append(self.sock)
            if time.monotonic() > deadline:
                raise TimeoutError

    class Http(Recording, http.client.HTTPConnection): ...

    class Https(Recording, http.client.HTTPSConnection): ...

    class HttpHandler(urllib.request.HTTPHandler):
        def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(Http, req)

    class HttpsHandler(urllib.request.HTTPSHandler):
        def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(Https, req)

    return urllib.request.build_opener(_HttpRedirectsOnly, HttpHandler, HttpsHandler)


def _is_http(source: Any) -> bool:
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))


def _too_large(name: str, max_bytes: int) -> ValueError:
    return ValueError(f"{name} is larger than max_bytes={max_bytes}; raise max_bytes or use a smaller file")


def _open_without_waiting(path: str, flags: int) -> int:
    # Without O_NONBLOCK, opening a FIFO waits for a writer.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _open_file(source: Any) -> BinaryIO:
    if isinstance(source, str) and source.startswith("file://"):
        path = Path(source[len("file://") :])
        source = path if path.exists() else Path(urllib.parse.unquote(str(path)))
    if not isinstance(source, (str, Path)):
        raise TypeError(
            f"a source must be a path, file:// or http(s) URL, base64 data string or bytes, got {type(source).__name__}"
        )
    name = describe_source(source)
    try:
        file = open(source, "rb", opener=_open_without_waiting)  # noqa: SIM115 - the caller closes it
    except FileNotFoundError as error:
        raise FileNotFoundError(f"file {name} does not exist; check the path") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read file {name}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"cannot read file {name}: it is not a regular file")
    return file


def _decode_base64(source: str) -> bytes:
    header, separator, payload = source.partition("base64,")
    if not separator:
        raise ValueError(f"data URL {describe_source(source)} must contain 'base64,' before its content")
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"data URL {header + 'base64,...'!r} is not valid base64: {error}") from error
