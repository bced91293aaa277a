"""Where pictures and videos come from: paths, addresses, base64 strings and bytes, read within limits."""

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

DOWNLOAD_TIMEOUT = 30.0
MAX_DOWNLOAD_BYTES = 256 * 1024 * 1024
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
    source: Any, *, timeout: float = DOWNLOAD_TIMEOUT, max_bytes: int = MAX_DOWNLOAD_BYTES
) -> Iterator[BinaryIO]:
    """A seekable binary file over a source, closed at the end; downloads go to a temporary file, not to memory.

    Args:
        source: path, ``file://`` or ``http(s)://`` address, ``data:...;base64,`` string, or bytes.
        timeout: seconds a download may take in all.
        max_bytes: size a download may have.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the source cannot be read within the limits; the message names it.
        TypeError: a source of another type.
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


def read_source(source: Any, *, timeout: float = DOWNLOAD_TIMEOUT, max_bytes: int = MAX_DOWNLOAD_BYTES) -> bytes:
    """Bytes of a source; arguments and errors as for :func:`open_source`."""
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        content = io.BytesIO()
        download(source, content, timeout=timeout, max_bytes=max_bytes)
        return content.getvalue()
    with open_source(source) as file:
        return file.read()


def _open_file(source: Any) -> BinaryIO:
    if isinstance(source, str) and source.startswith("file://"):
        path = Path(source[len("file://") :])
        source = path if path.exists() else Path(urllib.parse.unquote(str(path)))
    if not isinstance(source, (str, Path)):
        raise TypeError(
            "a source must be a path, file:// or http(s) address, base64 data string or bytes, "
            f"got {type(source).__name__}"
        )
    name = describe_source(source)
    try:
        return open(source, "rb")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"file {name} does not exist; check the path") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read file {name}: {getattr(error, 'strerror', None) or error}") from error


class _HttpRedirectsOnly(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        # A server must not be able to point the client at its own files.
        if not newurl.startswith(("http://", "https://")):
            raise urllib.error.URLError(f"it redirects to {newurl!r}, and only http and https are followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(
    url: str, file: BinaryIO, *, timeout: float = DOWNLOAD_TIMEOUT, max_bytes: int = MAX_DOWNLOAD_BYTES
) -> None:
    """Writes what is behind an http(s) address into a file.

    Args:
        url: the address; redirects are followed to http(s) only.
        file: open for writing in binary.
        timeout: seconds for the whole download.
        max_bytes: largest size accepted.

    Raises:
        ValueError: the address cannot be read within the limits.
    """
    name = describe_source(url)
    deadline = time.monotonic() + timeout
    opener = urllib.request.build_opener(_HttpRedirectsOnly)
    size = 0
    try:
        request = urllib.request.Request(url, headers={"User-Agent": USER_AGENT})
        with opener.open(request, timeout=timeout) as response:
            # read1 returns after one receive, so that a server that drips bytes meets the deadline too.
            while size <= max_bytes and (chunk := response.read1(1 << 20)):
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
        raise ValueError(f"{name} is larger than max_bytes={max_bytes}; raise it or use a smaller file")
    if missing:
        raise ValueError(f"cannot download {name}: the connection ended {missing} bytes early; try again")


def _decode_base64(source: str) -> bytes:
    header, separator, payload = source.partition("base64,")
    if not separator:
        raise ValueError(f"data address {describe_source(source)} must contain 'base64,' before its content")
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"data address {header + 'base64,...'!r} is not valid base64: {error}") from error
