"""Reads images and videos from paths, URLs, base64 strings and bytes, within limits of time and size."""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import math
import os
import re
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
# A shorter string is a path, even if its characters are those of base64. The smallest image files have 35 bytes.
MIN_BASE64_CHARACTERS = 44
# All that a URL may contain unencoded, and % because the URL may be encoded already
URL_CHARACTERS = "%:/?#[]@!$&'()*+,;=~"


def describe_source(source: Any) -> str:
    """Short name of a source for error messages."""
    if isinstance(source, (str, Path)):
        text = str(source)
        return repr(text if len(text) <= 120 else text[:60] + "...")
    if is_bytes(source):
        return f"<{memoryview(source.getbuffer() if isinstance(source, io.BytesIO) else source).nbytes} bytes>"
    return f"<{type(source).__name__}>"


def is_bytes(source: Any) -> bool:
    """Whether a source is the content of a file."""
    return isinstance(source, (bytes, bytearray, memoryview, io.BytesIO))


def has_scheme(source: Any, *schemes: str) -> bool:
    """Whether a source is a string that begins with one of `schemes` such as "data:", in upper or lower case."""
    return isinstance(source, str) and source[: max(map(len, schemes))].lower().startswith(schemes)


@contextmanager
def open_source(
    source: Any, *, timeout: float = DOWNLOAD_TIMEOUT_SECONDS, max_bytes: int = MAX_DOWNLOAD_BYTES
) -> Iterator[BinaryIO]:
    """Opens a source as a seekable binary file and closes it at the end. Downloads go to a temporary file.

    A source is a path, `file://` or `http(s)://` URL, `data:...;base64,` string, base64 string without this prefix, bytes,
    memoryview or BytesIO (its whole content). `timeout`, in seconds, and `max_bytes` limit downloads. A path must be that of a
    regular file. Raises FileNotFoundError, ValueError for a source that cannot be read
    (the message names it), or TypeError.
    """
    if is_bytes(source):
        with io.BytesIO(_to_bytes(source)) as file:
            yield file
    elif has_scheme(source, "data:"):
        with io.BytesIO(_decode_base64(source)) as file:
            yield file
    elif _is_http(source):
        with tempfile.TemporaryFile() as file:
            download(source, file, timeout=timeout, max_bytes=max_bytes)
            file.seek(0)
            yield file
    else:
        with _open_file_or_base64(source) as file:
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
        request = urllib.request.Request(_encoded_url(url), headers={"User-Agent": USER_AGENT})
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
    return has_scheme(source, "http://", "https://")


def _encoded_url(url: str) -> str:
    """A URL with international characters or spaces in ASCII: its host in IDNA, the rest percent-encoded."""
    scheme, netloc, *rest = urllib.parse.urlsplit(url.strip())
    user, at, host = netloc.rpartition("@")
    host = host if host.isascii() else host.encode("idna").decode("ascii")
    path, query, fragment = (urllib.parse.quote(part, safe=URL_CHARACTERS) for part in rest)
    return urllib.parse.urlunsplit((scheme, urllib.parse.quote(user, safe=URL_CHARACTERS) + at + host, path, query, fragment))


def _to_bytes(source: Any) -> bytes:
    return source.getvalue() if isinstance(source, io.BytesIO) else bytes(source)


def _too_large(name: str, max_bytes: int) -> ValueError:
    return ValueError(f"{name} is larger than max_bytes={max_bytes}; raise max_bytes or use a smaller file")


def _open_without_waiting(path: str, flags: int) -> int:
    # Without O_NONBLOCK, opening a FIFO waits for a writer.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _open_file_or_base64(source: Any) -> BinaryIO:
    try:
        return _open_file(source)
    except (FileNotFoundError, ValueError):
        if isinstance(source, str) and len(source) >= MIN_BASE64_CHARACTERS:
            with suppress(binascii.Error, ValueError):
                return io.BytesIO(base64.b64decode("".join(source.split()), validate=True))
        raise


def _open_file(source: Any) -> BinaryIO:
    if has_scheme(source, "file://"):
        path = Path(source[len("file://") :].removeprefix("localhost"))
        source = path if path.exists() else Path(urllib.parse.unquote(str(path)))
    if not isinstance(source, (str, Path)):
        raise TypeError(
            "a source must be a path, file:// or http(s) URL, base64 string, bytes, memoryview or BytesIO, "
            f"got {type(source).__name__}"
        )
    name = describe_source(source)
    try:
        file = open(source, "rb", opener=_open_without_waiting)  # noqa: SIM115 - the caller closes it
    except FileNotFoundError as error:
        if scheme := re.match(r"(\w+)://", str(source)):
            raise ValueError(f"{name} must be a path or a URL of http, https, file or data, got {scheme[1]}") from error
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
