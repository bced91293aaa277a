"""Videos of message parts to sampled frames, for both editions: files through PyAV, lists of pictures, tensors.

Symbols: N sampled frames, H and W height and width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .images import Edition, check_edition, fetch_image
from .patches import to_frame_tensors
from .sampling import (
    DEFAULT_FPS,
    FRAME_PIXEL_LIMITS,
    MIN_FRAME_SIMILARITY,
    Options,
    Size,
    check_options,
    check_range,
    frame_range,
    preview_frame_count,
    preview_frame_size,
    sample_indices,
    slow_fast_frame_count,
    slow_fast_frame_limit,
    slow_fast_sizes,
)
from .slow_fast import SlowFastClassifier
from .sources import describe_source, open_source
from .video_reader import DecodedFrame, VideoReader

VIDEO_TIMEOUT = 300.0
MAX_VIDEO_BYTES = 4 * 1024**3
# Frames waiting for their size to be known; beyond this the file is decoded a second time instead.
MAX_WAITING_BYTES = 256 * 1024**2

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampledVideo:
    """The frames of one video that the model is to see.

    Attributes:
        frames: uint8 tensor ``[N, 3, H, W]``; a list of uint8 ``[3, H, W]`` if sizes differ; or a list of pictures
            (Preview, from a list).
        seconds: float32 ``[N]``, time of each frame; None for pictures without ``fps``.
        fps: sampled frames a second (Preview).
        frame_types: int32 ``[N]``, 0 slow and 1 fast (1.5).
        slow_size, fast_size: ``(height, width)`` that the processor is to give the frames (1.5).
    """

    frames: torch.Tensor | list[Any]
    seconds: torch.Tensor | None
    fps: float = DEFAULT_FPS
    frame_types: torch.Tensor | None = None
    slow_size: Size | None = None
    fast_size: Size | None = None


def fetch_video(
    part: Mapping[str, Any],
    *,
    edition: Edition = "preview",
    original_size: bool = False,
    timeout: float | None = None,
    max_bytes: int | None = None,
) -> SampledVideo:
    """Reads, samples and sizes the video of one message part as ``keye_vl_utils`` does.

    A file is decoded as a stream; only sampled frames are kept, and each is shrunk as soon as its size is known, so
    memory depends on the model's token budget and not on the length of the clip. Where the official packages fail,
    this does what their users meant: 1.5 takes one frame of a clip shorter than ``1 / fps``, reads ``video_start`` and
    ``video_end``, and classifies clips one patch high; Preview shows a clip of a single frame twice. Times are the
    stream's own where the frame rate varies. As in the official package, 1.5 does not know ``nframes``.

    Args:
        part: has ``video``: path, ``file://`` or ``http(s)://`` address, ``data:`` string (also several base64 pictures
            with commas between), bytes, list of pictures or of parts with ``image``, tensor ``[T, 3, H, W]`` or array
            ``[T, H, W, 3]``; and the options of :mod:`keye_kernels.processing.sampling`.
        edition: whose rules apply.
        original_size: 1.5: keep all frames in the size of the file, as the official package does, for other processors
            than :class:`~keye_kernels.processing.KeyeProcessor`. It resizes them to the same pixels, later.
        timeout, max_bytes: seconds that a download may take, and size it may have; by default 300 and 4 GiB for a
            video, and those of :func:`~keye_kernels.processing.images.load_image` for each picture of a list.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a video that cannot be read, or an option out of range; the message names it.
        TypeError: a source of another type.
        ImportError: PyAV is missing and the video is a file.
    """
    check_edition(edition)
    check_options(part)
    source = part.get("video")
    if source is None:
        raise ValueError("a video part needs 'video' with a path, address, bytes, tensor or list of pictures")
    if edition == "1.5" and part.get("nframes") is not None:
        logger.warning("nframes is ignored: Keye-VL-1.5 samples by fps and max_frames")
    if isinstance(source, str) and source.startswith("data:") and "," in source.partition(",")[2]:
        header, *pictures = source.split(",")
        source = [f"{header},{picture}" for picture in pictures]
    limits = {"timeout": timeout, "max_bytes": max_bytes}
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    if isinstance(source, (torch.Tensor, np.ndarray)):
        source = _to_pictures(source, edition)
    if isinstance(source, (list, tuple)):
        if not source:
            raise ValueError("a video must have at least one frame, got an empty list")
        return _fetch_pictures(source, part, edition, limits)
    if not isinstance(source, (str, Path, bytes, bytearray)):
        raise TypeError(
            "a video must be a path, address, bytes, list of pictures, tensor [T, 3, H, W] or array [T, H, W, 3], "
            f"got {type(source).__name__}"
        )
    with open_video(source, **limits) as reader:
        if edition == "preview":
            return _read_preview(reader, part)
        return _read_slow_fast(reader, part, original_size)


@contextmanager
def open_video(
    source: Any, *, timeout: float = VIDEO_TIMEOUT, max_bytes: int = MAX_VIDEO_BYTES
) -> Iterator[VideoReader]:
    """A :class:`VideoReader` over anything :func:`open_source` takes, closed at the end."""
    with open_source(source, timeout=timeout, max_bytes=max_bytes) as file:
        yield VideoReader(file, describe_source(source))


def _read_preview(reader: VideoReader, options: Options) -> SampledVideo:
    first, last = _frame_range(reader, options)
    total = last - first + 1
    if total == 1 and options.get("nframes") is None:
        indices = [first]
    else:
        indices = sample_indices(first, last, preview_frame_count(options, total, reader.fps))
    count = max(len(indices), 2)
    size = preview_frame_size(options, count, reader.height, reader.width)
    frames = torch.empty(count, 3, *size, dtype=torch.uint8)
    for index, frame in enumerate(reader.frames(indices)):
        frames[index:] = _resize_bicubic(frame.to_rgb(), size)
    seconds = _seconds(reader, indices).expand(count) if len(indices) == 1 else _seconds(reader, indices)
    return SampledVideo(frames, seconds, fps=count / total * reader.fps)


def _read_slow_fast(reader: VideoReader, options: Options, original_size: bool) -> SampledVideo:
    first, last = _frame_range(reader, options)
    count = max(1, slow_fast_frame_count(options, last - first + 1, reader.fps))
    indices = sample_indices(first, last, count)
    classify = _classifier(options, reader.height, reader.width)
    keep = _FrameKeeper(options, reader.height, reader.width, count, original_size)
    types: list[int] = []
    for frame in reader.frames(indices):
        pixels = frame.to_rgb()
        types.append(classify(pixels))
        keep.add(frame, pixels, types)
    slow_size, fast_size = sizes = keep.sizes(sum(types))
    frames = keep.frames
    if len(frames) < count:
        frames = [
            _shrink(frame.to_rgb(), sizes[kind]) for frame, kind in zip(reader.frames(indices), types, strict=True)
        ]
    return SampledVideo(
        torch.stack(frames) if len({frame.shape for frame in frames}) == 1 else frames,
        _seconds(reader, indices),
        frame_types=torch.tensor(types, dtype=torch.int32),
        slow_size=slow_size,
        fast_size=fast_size,
    )


class _FrameKeeper:
    """Keeps frames while their types become known, each shrunk as soon as the final sizes are certain.

    Sizes shrink with every slow frame, so they are certain once it makes no difference whether all the remaining
    frames are slow or fast. Until then frames wait as decoded; ``frames`` stays short where too many had to wait.
    """

    def __init__(self, options: Options, height: int, width: int, count: int, original_size: bool) -> None:
        self.frames: list[torch.Tensor] = []
        self._options, self._size, self._count, self._original_size = options, (height, width), count, original_size
        self._waiting: list[DecodedFrame] = []
        self._waiting_bytes = 0

    def sizes(self, fast: int) -> tuple[Size, Size]:
        return slow_fast_sizes(self._options, *self._size, self._count - fast, fast)

    def add(self, frame: DecodedFrame, pixels: torch.Tensor, types: list[int]) -> None:
        """The next frame, also in RGB, and the types of all frames up to it."""
        if self._original_size:
            self.frames.append(pixels)
        elif self._waiting_bytes <= MAX_WAITING_BYTES:
            sizes = self.sizes(sum(types))
            if sizes == self.sizes(sum(types) + self._count - len(types)):
                self.frames += [
                    _shrink(earlier.to_rgb(), sizes[kind]) for earlier, kind in zip(self._waiting, types, strict=False)
                ]
                self.frames.append(_shrink(pixels, sizes[types[-1]]))
                self._waiting = []
                return
            self._waiting.append(frame)
            self._waiting_bytes += frame.nbytes
            if self._waiting_bytes > MAX_WAITING_BYTES:
                self._waiting = []


def _fetch_pictures(
    pictures: Sequence[Any], options: Options, edition: Edition, limits: Mapping[str, Any]
) -> SampledVideo:
    fps = options.get("fps")
    indices = list(range(len(pictures)))
    if edition == "1.5":
        indices = sample_indices(0, len(pictures) - 1, max(1, min(len(pictures), slow_fast_frame_limit(options))))
    shared = {name: value for name, value in options.items() if name not in ("type", "video")}
    pixel_limits = FRAME_PIXEL_LIMITS if edition == "1.5" else None
    images = []
    for index in indices:
        picture = pictures[index]
        part = picture if isinstance(picture, Mapping) else {**shared, "image": picture}
        if isinstance(part.get("image"), torch.Tensor):
            part = {**part, "image": _to_pictures(part["image"][None], edition)[0]}
        images.append(fetch_image(part, edition=edition, pixel_limits=pixel_limits, **limits))
    seconds = torch.tensor([(1 / fps) * index for index in indices], dtype=torch.float32) if fps else None
    if edition == "preview":
        if len(images) % 2:
            images.append(images[-1])
        return SampledVideo(images, seconds, fps=float(fps or DEFAULT_FPS))
    sizes = {(image.height, image.width) for image in images}
    if len(sizes) > 1:
        raise ValueError(
            f"the pictures of a video must have one size, got {sorted(sizes)} (height, width) after resizing; "
            "pass resized_height and resized_width"
        )
    frames = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    height, width = frames.shape[-2:]
    classify = _classifier(options, height, width)
    types = torch.tensor([classify(frame) for frame in frames], dtype=torch.int32)
    fast = int(types.sum())
    slow_size, fast_size = slow_fast_sizes(options, height, width, len(types) - fast, fast)
    return SampledVideo(frames, seconds, frame_types=types, slow_size=slow_size, fast_size=fast_size)


def _classifier(options: Options, height: int, width: int) -> SlowFastClassifier:
    threshold = options.get("min_frame_similarity")
    return SlowFastClassifier(height, width, MIN_FRAME_SIMILARITY if threshold is None else threshold)


def _frame_range(reader: VideoReader, options: Options) -> tuple[int, int]:
    count = len(reader.times)
    if reader.is_constant_rate:
        return frame_range(options, count, reader.fps)
    start, end = options.get("video_start"), options.get("video_end")
    first = 0 if start is None else int(np.searchsorted(reader.times, start))
    last = count - 1 if end is None else int(np.searchsorted(reader.times, end, side="right")) - 1
    check_range(options, first, last, reader.times[-1])
    return first, last


def _seconds(reader: VideoReader, indices: Sequence[int]) -> torch.Tensor:
    # At a constant rate the official product, free of the container's rounding.
    if reader.is_constant_rate:
        return torch.tensor([(1 / reader.fps) * index for index in indices], dtype=torch.float32)
    return torch.tensor(reader.times[list(indices)], dtype=torch.float32)


def _shrink(pixels: torch.Tensor, size: Size) -> torch.Tensor:
    """A frame in its final size, if that is the smaller one; enlarging is left to the processor."""
    if size[0] * size[1] >= pixels.shape[1] * pixels.shape[2]:
        return pixels
    return torch.nn.functional.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]


def _resize_bicubic(pixels: torch.Tensor, size: Size) -> torch.Tensor:
    """uint8 ``[3, *size]``, rounded from float32 as torchvision does it."""
    if pixels.shape[1:] == size:
        return pixels
    resized = torch.nn.functional.interpolate(pixels[None].float(), size, mode="bicubic", antialias=True)[0]
    return resized.clamp(0, 255).round().to(torch.uint8)


def _to_pictures(video: torch.Tensor | np.ndarray, edition: Edition) -> list[np.ndarray]:
    return [frame.permute(1, 2, 0).contiguous().numpy() for frame in to_frame_tensors(video, edition)]
