"""Reads images and videos from paths, URLs, base64 strings and bytes, within limits of time and size."""

from __future__ import annotations

import base64
import binascii
import io
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

DOWNLOAD_TIMEOUT_SECONDS = 30.0
MAX_DOWNLOAD_BYTES = 256 * 1024 * 1024
DOWNLOAD_CHUNK_BYTES = 1 << 20
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
    limit downloads. Raises FileNotFoundError, ValueError for a source that cannot be read (the message names it), or TypeError.
    """
    if isinstance(source, (bytes, bytearray)):
        with io.BytesIO(source) as file:
            yield file
    elif isinstance(source, str) and source.startswith("data:"):
        with io.BytesIO(_decode_base64(source)) as file:
            yield file
    elif isinstance(source, str) and source.startswith(("http://", "https://")):
        with tempfile.TemporaryFile() as file:
            download(source, file, timeout=timeout, max_bytes=max_bytes)
            file.seek(0)
            yield file
    else:
        with _open_file(source) as file:
            yield file


def read_source(source: Any, *, timeout: float = DOWNLOAD_TIMEOUT_SECONDS, max_bytes: int = MAX_DOWNLOAD_BYTES) -> bytes:
    """Returns the bytes of a source; arguments and errors as for `open_source`."""
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        content = io.BytesIO()
        download(source, content, timeout=timeout, max_bytes=max_bytes)
        return content.getvalue()
    with open_source(source) as file:
        return file.read()


def download(url: str, file: BinaryIO, *, timeout: float, max_bytes: int) -> None:
    """Downloads a URL into a file that is open for writing. `timeout` limits the whole download, in seconds.

    Raises ValueError if the URL cannot be read within the limits.
    """
    name = describe_source(url)
    deadline = time.monotonic() + timeout
    opener = urllib.request.build_opener(_HttpRedirectsOnly)
    size = 0
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
    except Exception as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise ValueError(f"{name} did not arrive within timeout={timeout} seconds") from error
        raise ValueError(f"cannot download {name}: {reason or type(reason).__name__}") from error
    if size > max_bytes:
        raise ValueError(f"{name} is larger than max_bytes={max_bytes}; raise max_bytes or use a smaller file")
    if missing:
        raise ValueError(f"cannot download {name}: the connection ended {missing} bytes early; try again")


class _HttpRedirectsOnly(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str) -> Any:
        # A server must not be able to make the client read its own local files.
        if not newurl.startswith(("http://", "https://")):
            raise urllib.error.URLError(f"it redirects to {newurl!r}, and only http and https are followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


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
        return open(source, "rb")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"file {name} does not exist; check the path") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read file {name}: {getattr(error, 'strerror', None) or error}") from error


def _decode_base64(source: str) -> bytes:
    header, separator, payload = source.partition("base64,")
    if not separator:
        raise ValueError(f"data URL {describe_source(source)} must contain 'base64,' before its content")
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"data URL {header + 'base64,...'!r} is not valid base64: {error}") from error
