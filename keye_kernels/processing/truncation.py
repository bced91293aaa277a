"""The file size that a video file declares, for the containers that store it: Matroska, WebM and AVI."""

from __future__ import annotations

from typing import BinaryIO

EBML_HEADER, MATROSKA_SEGMENT = 0x1A45DFA3, 0x18538067


def declared_size(file: BinaryIO) -> int | None:
    """Returns the size in bytes that the file declares, or None if its format has no such field. Moves the file position."""
    file.seek(0)
    start = file.read(12)
    if start[:4] == b"RIFF" and start[8:] == b"AVI ":
        return 8 + int.from_bytes(start[4:8], "little")
    file.seek(0)
    if _read_number(file, keep_marker=True) != EBML_HEADER:
        return None
    header_size = _read_number(file)
    if header_size is None:
        return None
    file.seek(header_size, 1)
    if _read_number(file, keep_marker=True) != MATROSKA_SEGMENT:
        return None
    size = _read_number(file)
    return None if size is None else file.tell() + size


def _read_number(file: BinaryIO, keep_marker: bool = False) -> int | None:
    """Reads an EBML variable-length integer (RFC 8794, section 4); None for "unknown" or at the end of the file."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    length = 9 - first[0].bit_length()
    value = int.from_bytes(first + file.read(length - 1), "big")
    if keep_marker:
        return value
    payload = (1 << 7 * length) - 1
    return None if value & payload == payload else value & payload
