"""Reads video files with PyAV: the times of all frames, and the decoded frames at chosen indices."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator, Sequence
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

# Containers round times to ticks of their time base. A larger difference means that the frame rate is variable.
MAX_ROUNDING_TICKS = 1.5
# The duration in a header may be wrong by a frame or an audio packet. A larger difference means that the file is truncated.
MAX_MISSING_SECONDS = 0.5
MAX_FILE_FPS = 1000.0
# Frame rate of a file that has neither timestamps nor a valid frame rate.
FALLBACK_FPS = 25.0
# Largest relative difference between the header's frame rate and the measured one.
MAX_FPS_ERROR = 0.2
BUFFER_BYTES = 1 << 18
# FFmpeg's names of the accepted containers and raw streams. Others, such as SDP and playlists, open sockets and other files.
CONTAINERS = (
    *("mov", "mp4", "matroska", "webm", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "asf", "ogg", "nut", "mxf", "dv", "gif"),
    *("ivf", "obu", "av1", "h264", "hevc", "m4v", "mjpeg", "yuv4mpegpipe", "wav", "mp3", "flac"),
)
MAX_STREAMS = 64
# The sides of a decoder's buffers are multiples of at most this number, that of the largest blocks and of aligned lines.
BUFFER_ALIGNMENT_PIXELS = 64
# Five million frames last 46 hours at 30 frames per second. Sound has packets of its own.
MAX_PACKETS = 20_000_000
# For scanning and decoding one file, including the time to resize and classify its frames.
MAX_READ_SECONDS = 1800.0


class DecodedFrame(NamedTuple):
    """One frame in the format of the decoder, in most files 1.5 bytes per pixel, and its size in pixels after rotation."""

    frame: VideoFrame
    height: int
    width: int

    @property
    def nbytes(self) -> int:
        return sum(plane.buffer_size for plane in self.frame.planes)

    def to_rgb(self) -> torch.Tensor:
        """Converts to rotated RGB, uint8 `[3, H, W]`. If the size changes within the video, scales to that of the first frame."""
        turns = _quarter_turns(self.frame)
        height, width = (self.width, self.height) if turns % 2 else (self.height, self.width)
        pixels = self.frame.to_ndarray(format="rgb24", height=height, width=width)
        return torch.from_numpy(np.ascontiguousarray(np.rot90(pixels, turns))).permute(2, 0, 1)


class _Packets(NamedTuple):
    """The packets of a video stream in decoding order: presentation timestamps, keyframes, and which packets are shown."""

    pts: list[int | None]
    is_key: np.ndarray
    is_shown: np.ndarray


class VideoReader:
    """Reads one video file, a seekable binary file that the caller closes. `name` is used in error messages.

    The constructor reads all packets once without decoding them, so the number of frames and their times are exact; those in the
    file header can be estimates. It raises ValueError if the file has no video, is damaged or truncated, or has too large frames.

    `height` and `width` are those of the rotated frames, `fps` is the average rate, `times` the seconds from the first frame to
    each frame, float64 `[N]`. `is_constant_rate`: the time of frame i is `i / fps`, up to the rounding of the container.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.name = name
        self._deadline = time.monotonic() + MAX_READ_SECONDS
        self._file = file
        size, expected = file.seek(0, os.SEEK_END), declared_size(file)
        if expected is not None and size < expected:
            raise self._damaged(f"it has {size} of {expected} bytes")
        with self._open() as (container, stream):
            self._check_area(stream.codec_context.height, stream.codec_context.width)
            self._packets = self._scan(container, stream)
            shown_pts = [pts for pts, shown in zip(self._packets.pts, self._packets.is_shown, strict=True) if shown]
            if not shown_pts:
                raise ValueError(f"video {name} has no frames")
            # AVI stores decoding timestamps or none. With B-frames, the decoding order is not the display order.
            is_reordered = container.format.name == "avi" and stream.codec_context.has_b_frames
            distinct_pts = {pts for pts in shown_pts if pts is not None}
            self._has_pts = len(distinct_pts) == len(shown_pts) and not is_reordered
            self._frame_pts = np.array(sorted(distinct_pts) if self._has_pts else range(len(shown_pts)), dtype=np.int64)
            self._set_times(stream)
        with closing(self._decode(None)) as decoded:
            first = next((frame for _, frame in decoded), None)
        if first is None:
            raise self._damaged("its first frame cannot be decoded")
        is_turned = _quarter_turns(first) % 2 == 1
        self.height, self.width = (first.width, first.height) if is_turned else (first.height, first.width)
        self._check_area(self.height, self.width)

    def frames(self, indices: Sequence[int]) -> Iterator[DecodedFrame]:
        """Decodes the frames at the given increasing indices; the pixels equal those of a full decode.

        Skips GOPs without a requested frame, and frames that no requested frame depends on. Raises ValueError for a damaged file.
        """
        done = 0
        # If skipping loses a frame, as in streams without clean keyframes, all frames are decoded and counted instead.
        for skip in (True, False) if self._has_pts else (False,):
            wanted = [int(self._frame_pts[index]) for index in indices] if skip else indices
            with closing(self._decode(frozenset(wanted) if skip else None)) as decoded:
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
        limits = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "none", "max_streams": str(MAX_STREAMS)}
        try:
            container = av.open(
                _NamelessFile(self._file), "r", container_options=limits, buffer_size=BUFFER_BYTES, io_open=_reject_other_files
            )
        except (av.error.FFmpegError, ValueError) as error:
            formats = ", ".join(CONTAINERS)
            raise ValueError(
                f"video {self.name} cannot be opened; it is empty, truncated or not in a supported format ({formats})"
            ) from error
        with container:
            # FFmpeg lists the cover image of an audio file as a video stream.
            cover_image = av.stream.Disposition.attached_pic
            streams = [stream for stream in container.streams.video if not stream.disposition & cover_image]
            if not streams:
                kinds = ", ".join(sorted({stream.type for stream in container.streams} - {"video"}))
                raise ValueError(f"{self.name} has no video stream (it has: {kinds or 'nothing'})")
            if streams[0].codec_context is None:
                raise ValueError(f"video {self.name} has a codec that FFmpeg does not know or cannot decode; convert it to H.264")
            try:
                yield container, streams[0]
            except av.error.FFmpegError as error:
                raise self._damaged(str(error.strerror)) from error

    def _scan(self, container: InputContainer, stream: VideoStream) -> _Packets:
        pts, flags, end = [], [], 0.0
        for index, packet in enumerate(container.demux()):
            if index > MAX_PACKETS:
                raise ValueError(f"video {self.name} has more than {MAX_PACKETS} packets")
            self._check_time()
            if packet.pts is not None and packet.time_base:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream_index == stream.index and packet.size:
                if packet.is_corrupt:
                    raise self._damaged("it ends in the middle of a frame")
                pts.append(packet.pts)
                flags.append((packet.is_keyframe, not packet.is_discard))
        duration = (container.duration or 0) / 1e6
        # Matroska measures the duration from time 0, MP4 from the first frame.
        missing = duration - end + min(0.0, (container.start_time or 0) / 1e6)
        # The headers of other formats have no duration; FFmpeg estimates it.
        has_duration = any(name in container.format.name for name in ("mp4", "matroska"))
        if len(pts) < len(stream.index_entries):
            raise self._damaged(f"it has {len(pts)} of {len(stream.index_entries)} frames")
        if has_duration and missing > max(MAX_MISSING_SECONDS, 0.01 * duration):
            raise self._damaged(f"{missing:.2f} of its {duration:.2f} seconds are missing")
        is_key, is_shown = np.array(flags, dtype=bool).reshape(-1, 2).T
        return _Packets(pts, is_key, is_shown)

    def _set_times(self, stream: VideoStream) -> None:
        count, tick = len(self._frame_pts), float(stream.time_base or 0)
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        self.times = (self._frame_pts - self._frame_pts[0]) * tick
        if not self._has_pts:
            rate = rate if 0 < rate <= MAX_FILE_FPS else FALLBACK_FPS
            self.times = np.arange(count) / rate
        measured = (count - 1) / self.times[-1] if count > 1 else rate
        # The header's rate is used unless it contradicts the timestamps.
        is_plausible = 0 < rate <= MAX_FILE_FPS and abs(rate - measured) <= MAX_FPS_ERROR * rate
        self.fps = rate if is_plausible else measured
        if not 0 < self.fps <= MAX_FILE_FPS:
            raise ValueError(f"video {self.name} has a frame rate of {self.fps}; expected above 0 and at most {MAX_FILE_FPS:.0f}")
        drift = np.abs(self.times - np.arange(count) / self.fps).max()
        self.is_constant_rate = bool(drift <= MAX_ROUNDING_TICKS * tick)

    def _decode(self, wanted: frozenset[int] | None) -> Generator[tuple[int, VideoFrame], None, None]:
        """Yields `(index, frame)` of all frames, or with `wanted` timestamps `(timestamp, frame)` of at least those frames.

        With `wanted`, it stops early at a decoding error.
        """
        import av

        needed = np.ones(len(self._packets.pts), bool) if wanted is None else self._packets_to_decode(wanted)
        with self._open() as (container, stream):
            context = stream.codec_context
            context.thread_type = "AUTO"
            # Without this, FFmpeg conceals damage with parts of other frames.
            context.options = {"err_detect": "explode"}
            if limit := _max_frame_pixels():
                # Of frames that grow within a stream; FFmpeg checks it before it allocates them, with the sides of its buffers.
                buffer_pixels = _aligned(context.height) * _aligned(context.width)
                context.options |= {"max_pixels": str(max(limit, buffer_pixels))}
            packets = (packet for packet in container.demux(stream) if packet.size)
            count, is_flushed = 0, True
            is_skipping = wanted is not None
            try:
                for is_needed, packet in zip([*needed, False], chain(packets, [None]), strict=False):
                    self._check_time()
                    frames: list[VideoFrame] = []
                    if packet is not None and is_needed:
                        # A frame that is not requested is only decoded if other frames refer to it.
                        is_requested = wanted is None or packet.pts in wanted
                        context.skip_frame = "DEFAULT" if is_requested else "NONREF"
                        frames = context.decode(packet)
                    elif not is_flushed:
                        frames = context.decode(None)
                        context.flush_buffers()
                    is_flushed = not is_needed
                    for frame in frames:
                        if not is_skipping:
                            yield count, frame
                            count += 1
                        elif frame.pts is not None:
                            yield frame.pts, frame
            except av.error.FFmpegError:
                if not is_skipping:
                    raise

    def _packets_to_decode(self, wanted: frozenset[int]) -> np.ndarray:
        """Returns bool `[packets]`: in each GOP with a wanted frame, the packets from the keyframe to the last wanted frame."""
        packets = self._packets
        pts = np.array([-1 if timestamp is None else timestamp for timestamp in packets.pts])
        gop, position = np.cumsum(packets.is_key), np.arange(len(pts))
        is_wanted = np.isin(pts, list(wanted))
        last = np.full(gop[-1] + 1, -1)
        np.maximum.at(last, gop[is_wanted], position[is_wanted])
        # In an open GOP, a frame shown before the keyframe also refers to the previous GOP.
        keyframe_pts = np.full(len(last), pts.min())
        keyframe_pts[gop[packets.is_key]] = pts[packets.is_key]
        previous = np.unique(gop[is_wanted & (pts < keyframe_pts[gop])]) - 1
        last[previous] = np.searchsorted(gop, previous, side="right") - 1
        return position <= last[gop]

    def _check_area(self, height: int, width: int) -> None:
        limit = _max_frame_pixels()
        if limit and height * width > limit:
            raise ValueError(
                f"video {self.name} is rejected as a decompression bomb: frames of {height}x{width} exceed {limit} "
                "pixels; if you trust it, raise PIL.Image.MAX_IMAGE_PIXELS before loading"
            )

    def _check_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise ValueError(f"video {self.name} took longer than {MAX_READ_SECONDS} seconds to read")

    def _damaged(self, reason: str) -> ValueError:
        return ValueError(f"video {self.name} is damaged or truncated: {reason}")


class _NamelessFile:
    """Hides the name of a file, from which FFmpeg would guess its format and other files to open."""

    def __init__(self, file: BinaryIO) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def _reject_other_files(url: str, flags: int, options: dict[str, Any]) -> NoReturn:
    # A playlist contains paths and URLs of other files, which must not be read.
    raise ValueError(f"a video must not open other files, got {url!r}")


def _max_frame_pixels() -> int | None:
    from PIL import Image

    # Pillow's rule for images: an error above twice MAX_IMAGE_PIXELS.
    return 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else None


def _aligned(side: int) -> int:
    return -(-side // BUFFER_ALIGNMENT_PIXELS) * BUFFER_ALIGNMENT_PIXELS


def _quarter_turns(frame: VideoFrame) -> int:
    """Returns the rotation in the metadata, in counterclockwise quarter turns."""
    return round(frame.rotation / 90) % 4
