"""Video files through PyAV: the times of all frames, and chosen frames decoded one after the other."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn

import numpy as np
import torch

from .truncation import declared_size

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

# Containers round times to their ticks; a frame further off means a variable rate.
TICKS_TOLERANCE = 1.5
# Headers are off by a frame or an audio packet, not by this many seconds, unless the end of the file is missing.
LENGTH_TOLERANCE = 0.5
MAX_FPS = 1000.0
BUFFER_BYTES = 1 << 18


class DecodedFrame(NamedTuple):
    """One frame as decoded, mostly 1.5 bytes a pixel, and the upright size that :meth:`to_rgb` gives it."""

    frame: VideoFrame
    height: int
    width: int

    @property
    def nbytes(self) -> int:
        """Memory that keeping the frame takes."""
        return sum(plane.buffer_size for plane in self.frame.planes)

    def to_rgb(self) -> torch.Tensor:
        """uint8 ``[3, H, W]``; where a stream changes its size, scaled to the size of the first frame."""
        turns = _quarter_turns(self.frame)
        height, width = (self.width, self.height) if turns % 2 else (self.height, self.width)
        pixels = self.frame.to_ndarray(format="rgb24", height=height, width=width)
        return torch.from_numpy(np.ascontiguousarray(np.rot90(pixels, turns))).permute(2, 0, 1)


class _Packets(NamedTuple):
    """The video's packets in decoding order: time stamps, entry points, and which are shown."""

    pts: list[int | None]
    is_key: np.ndarray
    is_shown: np.ndarray


class VideoReader:
    """One video file: what is in it, and its frames.

    Opening reads through the packets once without decoding them, so that the number of frames and their times are
    the stream's own and not a container's estimate.

    Attributes:
        name: for errors.
        height, width: size of the frames, rotated as the metadata asks.
        fps: average frames a second.
        times: float64 ``[N]``, seconds of each frame after the first one.
        is_constant_rate: frame i stands at ``i / fps``, but for the container's rounding.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        """Opens a video.

        Args:
            file: seekable, open in binary; stays the caller's to close.
            name: for errors.

        Raises:
            ImportError: PyAV is missing.
            ValueError: no video in the file, a damaged or truncated one, or one with frames too large.
        """
        self.name = name
        self._file = file
        size, expected = file.seek(0, os.SEEK_END), declared_size(file)
        if expected is not None and size < expected:
            raise self._damaged(f"it has {size} of {expected} bytes")
        with self._open() as (container, stream):
            self._check_area(stream.codec_context.height, stream.codec_context.width)
            self._packets = self._scan(container, stream)
            stamps = [pts for pts, shown in zip(self._packets.pts, self._packets.is_shown, strict=True) if shown]
            if not stamps:
                raise ValueError(f"video {name} has no frames")
            # AVI stores decoding times, or none, which do not tell frames apart once B frames change their order.
            is_reordered = container.format.name == "avi" and stream.codec_context.has_b_frames
            self._has_stamps = None not in stamps and len(set(stamps)) == len(stamps) and not is_reordered
            self._stamps = np.array(sorted(stamps) if self._has_stamps else range(len(stamps)), dtype=np.int64)
            self._set_times(stream)
        with closing(self._decode(None)) as decoded:
            _, first = next(decoded, (0, None))
        if first is None:
            raise self._damaged("its first frame cannot be decoded")
        size = (first.height, first.width)
        self.height, self.width = size[::-1] if _quarter_turns(first) % 2 else size
        self._check_area(self.height, self.width)

    def frames(self, indices: Sequence[int]) -> Iterator[DecodedFrame]:
        """Decodes the frames of increasing ``indices``, equal to those of a full decode.

        Groups of pictures that hold none of them are jumped over, and pictures that no other one needs are left
        undecoded.

        Raises:
            ValueError: the file is damaged.
        """
        done = 0
        # Where jumping loses a frame, as in streams without clean entry points, all are decoded and counted instead.
        for jump in (True, False) if self._has_stamps else (False,):
            wanted = [int(self._stamps[index]) for index in indices] if jump else indices
            with closing(self._decode(frozenset(wanted) if jump else None)) as decoded:
                for key, frame in decoded:
                    if key > wanted[done] or (key == wanted[done] and frame.is_corrupt):
                        break
                    if key == wanted[done]:
                        yield DecodedFrame(frame, self.height, self.width)
                        done += 1
                        if done == len(wanted):
                            return
        raise self._damaged(f"frame {indices[done]} cannot be decoded")

    @contextmanager
    def _open(self) -> Iterator[tuple[InputContainer, VideoStream]]:
        try:
            import av
        except ImportError as error:
            raise ImportError("reading video files needs PyAV; install it with: pip install av") from error
        self._file.seek(0)
        try:
            container = av.open(_Unnamed(self._file), buffer_size=BUFFER_BYTES, io_open=_refuse)
        except (av.error.FFmpegError, ValueError) as error:
            raise ValueError(
                f"video {self.name} cannot be opened; it is empty, truncated or in no format that FFmpeg knows"
            ) from error
        with container:
            # FFmpeg shows cover pictures of audio files as video streams.
            cover = av.stream.Disposition.attached_pic
            streams = [stream for stream in container.streams.video if not stream.disposition & cover]
            if not streams:
                kinds = ", ".join(sorted({stream.type for stream in container.streams} - {"video"}))
                raise ValueError(f"{self.name} has no video stream (it has: {kinds or 'nothing'})")
            try:
                yield container, streams[0]
            except av.error.FFmpegError as error:
                raise self._damaged(error.strerror) from error

    def _scan(self, container: InputContainer, stream: VideoStream) -> _Packets:
        pts, flags, end = [], [], 0.0
        for packet in container.demux():
            if packet.pts is not None and packet.time_base:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream_index == stream.index and packet.size:
                if packet.is_corrupt:
                    raise self._damaged("it ends in the middle of a frame")
                pts.append(packet.pts)
                flags.append((packet.is_keyframe, not packet.is_discard))
        length = (container.duration or 0) / 1e6
        # Matroska counts the length from zero, MP4 from the first frame.
        missing = length - end + min(0.0, (container.start_time or 0) / 1e6)
        # Other formats have no length in their header, and FFmpeg only guesses it.
        has_length = any(name in container.format.name for name in ("mp4", "matroska"))
        if len(pts) < len(stream.index_entries):
            raise self._damaged(f"it has {len(pts)} of {len(stream.index_entries)} frames")
        if has_length and missing > max(LENGTH_TOLERANCE, 0.01 * length):
            raise self._damaged(f"{missing:.2f} of its {length:.2f} seconds are missing")
        is_key, is_shown = np.array(flags, dtype=bool).reshape(-1, 2).T
        return _Packets(pts, is_key, is_shown)

    def _set_times(self, stream: VideoStream) -> None:
        count, tick = len(self._stamps), float(stream.time_base)
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        self.times = (self._stamps - self._stamps[0]) * tick
        if not self._has_stamps:
            rate = rate if 0 < rate <= MAX_FPS else 25.0
            self.times = np.arange(count) / rate
        measured = (count - 1) / self.times[-1] if count > 1 else rate
        # A header's rate is kept unless it contradicts the stamps.
        self.fps = rate if 0 < rate <= MAX_FPS and abs(rate - measured) <= 0.2 * rate else measured
        if not 0 < self.fps <= MAX_FPS:
            raise ValueError(f"video {self.name} has a frame rate of {self.fps}; expected at most {MAX_FPS:.0f}")
        drift = np.abs(self.times - np.arange(count) / self.fps).max()
        self.is_constant_rate = bool(drift <= TICKS_TOLERANCE * tick)

    def _decode(self, wanted: frozenset[int] | None) -> Iterator[tuple[int, VideoFrame]]:
        """``(number, frame)`` of all frames; or ``(stamp, frame)`` of at least the wanted stamps, as far as it goes."""
        import av

        needed = np.ones(len(self._packets.pts), bool) if wanted is None else self._needed(wanted)
        with self._open() as (container, stream):
            context = stream.codec_context
            context.thread_type = "AUTO"
            # Without this FFmpeg paints over damage with parts of other frames.
            context.options = {"err_detect": "explode"}
            packets = (packet for packet in container.demux(stream) if packet.size)
            count, is_fresh = 0, True
            is_jumping = wanted is not None
            try:
                for is_needed, packet in zip([*needed, False], chain(packets, [None]), strict=False):
                    frames: list[VideoFrame] = []
                    if is_needed:
                        is_spare = is_jumping and packet.pts not in wanted
                        context.skip_frame = "NONREF" if is_spare else "DEFAULT"
                        frames = context.decode(packet)
                    elif not is_fresh:
                        frames = context.decode(None)
                        context.flush_buffers()
                    is_fresh = not is_needed
                    for frame in frames:
                        if not is_jumping:
                            yield count, frame
                            count += 1
                        elif frame.pts is not None:
                            yield frame.pts, frame
            except av.error.FFmpegError:
                if not is_jumping:
                    raise

    def _needed(self, wanted: frozenset[int]) -> np.ndarray:
        """Which packets to decode for the wanted frames, bool ``[packets]``: from an entry point to the last of them."""
        pts, is_key, _ = self._packets
        stamps = np.array([-1 if stamp is None else stamp for stamp in pts])
        group, position = np.cumsum(is_key), np.arange(len(pts))
        is_wanted = np.isin(stamps, list(wanted))
        last = np.full(group[-1] + 1, -1)
        np.maximum.at(last, group[is_wanted], position[is_wanted])
        # A picture shown before its group's key picture also needs the group before (an open group of pictures).
        key_stamp = np.full(len(last), stamps.min())
        key_stamp[group[is_key]] = stamps[is_key]
        before = np.unique(group[is_wanted & (stamps < key_stamp[group])]) - 1
        last[before] = np.searchsorted(group, before, side="right") - 1
        return position <= last[group]

    def _check_area(self, height: int, width: int) -> None:
        from PIL import Image

        # Pillow's own rule for pictures: twice its limit is an error.
        limit = 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else None
        if limit and height * width > limit:
            raise ValueError(
                f"video {self.name} is refused as a decompression bomb: frames of {height}x{width} exceed {limit} "
                "pixels; if you trust it, raise PIL.Image.MAX_IMAGE_PIXELS before loading"
            )

    def _damaged(self, reason: str) -> ValueError:
        return ValueError(f"video {self.name} is damaged or truncated: {reason}")


class _Unnamed:
    """A file without its name, from which FFmpeg would guess a format and siblings to open."""

    def __init__(self, file: BinaryIO) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def _refuse(url: str, flags: int, options: dict[str, Any]) -> NoReturn:
    # Playlists name further files and addresses; a video must not be able to read those.
    raise ValueError(f"a video may not open {url!r}")


def _quarter_turns(frame: VideoFrame) -> int:
    """Quarter turns counterclockwise that the metadata asks for."""
    return round(frame.rotation / 90) % 4
