"""Loads the videos of message parts (files, lists of images, arrays, tensors) and samples their frames, for both editions.

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

from keye_kernels.editions import Edition, EditionName, edition_named

from . import sampling
from .frame_buffer import FrameBuffer, shrink
from .images import decode_repeated, fetch_image
from .patches import to_frame_array, to_frame_tensors
from .sampling import DEFAULT_FPS, FRAME_FACTOR, Options, Size
from .slow_fast import SlowFastClassifier
from .sources import describe_source, has_scheme, is_bytes, open_source
from .threads import map_in_threads
from .video_reader import VideoReader

VIDEO_TIMEOUT_SECONDS = 300.0
MAX_VIDEO_BYTES = 4 * 1024**3
# Of a video given as images, also as a single one
IMAGE_DATA = ("data:image/", "data:video/jpeg")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampledVideo:
    """The N sampled frames of one video."""

    # uint8 [N, 3, H, W]; a list of uint8 [3, H, W] if sizes differ; or a list of images, for a Preview video given as a list
    frames: torch.Tensor | list[Any]
    seconds: torch.Tensor | None  # float32 [N]; None for a list of images without fps
    fps: float = DEFAULT_FPS  # sampled frames per second (Preview)
    # 1.5: int32 [N], 0 for slow and 1 for fast, and (height, width) to which the processor resizes slow and fast frames
    frame_types: torch.Tensor | None = None
    slow_size: Size | None = None
    fast_size: Size | None = None


def fetch_video(
    part: Mapping[str, Any], *, edition: EditionName = "preview", original_size: bool = False, **limits: Any
) -> SampledVideo:
    """Loads the video of one message part, samples its frames and resizes them, as `keye_vl_utils` does.

    `video` of the part, or `video_url` (also as `{"url": ...}`), is a path, `file://` or `http(s)://` URL, base64 string, `data:`
    string (of a video, or of base64 images separated by commas), bytes, list of images or of parts with `image`, or array or
    tensor that `to_frame_tensors` takes. The part may have the options of `keye_kernels.processing.sampling`. `limits` are
    `timeout` and `max_bytes` of a download. Other arguments and errors as for `process_vision_info`.

    A file is decoded as a stream. Only the sampled frames are kept, and each is resized as soon as its final size is known, so
    memory depends on the token budget of the model and not on the length of the video. Times are read from the file if its frame
    rate varies.

    Some videos for which the official packages raise an error are supported. For 1.5: a clip shorter than `1 / fps` (one frame is
    sampled), `video_start` and `video_end`, and clips that are one 28-pixel block high. For Preview: a video of one frame (the
    frame is repeated). As in the official package, 1.5 ignores `nframes`.
    """
    rules = edition_named(edition)
    sampling.check_options(part)
    source = part["video"] if "video" in part else part.get("video_url")
    if isinstance(source, Mapping):
        source = source.get("url")
    if source is None:
        raise ValueError("a video part needs 'video' with a path, URL, bytes, tensor or list of images")
    if rules.slow_fast_frames and part.get("nframes") is not None:
        logger.warning("nframes is ignored: Keye-VL-1.5 samples by fps and max_frames")
    if has_scheme(source, *IMAGE_DATA) or (has_scheme(source, "data:") and "," in source.partition(",")[2]):
        header, *encoded_images = source.split(",")
        source = [f"{header},{encoded}" for encoded in encoded_images]
    if isinstance(source, (torch.Tensor, np.ndarray)):
        source = [to_frame_array(frame) for frame in to_frame_tensors(source, edition)]
    if isinstance(source, (list, tuple)):
        if not source:
            raise ValueError("a video must have at least one frame, got an empty list")
        return _fetch_image_list(source, part, rules, limits)
    if not isinstance(source, (str, Path)) and not is_bytes(source):
        raise TypeError(
            "a video must be a path, URL, base64 string, bytes, memoryview, BytesIO, list of images, tensor or array, "
            f"got {type(source).__name__}"
        )
    with open_video(source, **limits) as reader:
        if rules.slow_fast_frames:
            return _read_slow_fast(reader, part, original_size)
        return _read_preview(reader, part)


@contextmanager
def open_video(source: Any, *, timeout: float = VIDEO_TIMEOUT_SECONDS, max_bytes: int = MAX_VIDEO_BYTES) -> Iterator[VideoReader]:
    """Opens a `VideoReader` on anything that `open_source` takes, and closes the file at the end."""
    with open_source(source, timeout=timeout, max_bytes=max_bytes) as file:
        yield VideoReader(file, describe_source(source))


def _read_preview(reader: VideoReader, options: Options) -> SampledVideo:
    first, last = _frame_range(reader, options)
    total = last - first + 1
    if total == 1 and options.get("nframes") is None:
        indices = [first]
    else:
        indices = sampling.sample_indices(first, last, sampling.preview_frame_count(options, total, reader.fps))
    count = max(len(indices), FRAME_FACTOR)
    size = sampling.preview_frame_size(options, count, reader.height, reader.width)
    frames = torch.empty(count, 3, *size, dtype=torch.uint8)
    for index, frame in enumerate(reader.frames(indices)):
        frames[index:] = _resize_bicubic(frame.to_rgb(), size)
    seconds = _seconds(reader, indices).expand(count) if len(indices) == 1 else _seconds(reader, indices)
    return SampledVideo(frames, seconds, fps=count / total * reader.fps)


def _read_slow_fast(reader: VideoReader, options: Options, original_size: bool) -> SampledVideo:
    first, last = _frame_range(reader, options)
    count = max(1, sampling.slow_fast_frame_count(options, last - first + 1, reader.fps))
    indices = sampling.sample_indices(first, last, count)
    classify = SlowFastClassifier(reader.height, reader.width, options.get("min_frame_similarity"))
    buffer = FrameBuffer(options, reader.height, reader.width, count, original_size)
    types: list[int] = []
    for frame in reader.frames(indices):
        pixels = frame.to_rgb()
        types.append(classify(pixels))
        buffer.add(frame, pixels, types)
    slow_size, fast_size = sizes = buffer.sizes(sum(types))
    frames = buffer.frames
    if len(frames) < count:
        frames = [shrink(frame.to_rgb(), sizes[kind]) for frame, kind in zip(reader.frames(indices), types, strict=True)]
    return SampledVideo(
        torch.stack(frames) if len({frame.shape for frame in frames}) == 1 else frames,
        _seconds(reader, indices),
        frame_types=torch.tensor(types, dtype=torch.int32),
        slow_size=slow_size,
        fast_size=fast_size,
    )


def _fetch_image_list(images: Sequence[Any], options: Options, edition: Edition, limits: Mapping[str, Any]) -> SampledVideo:
    fps = options.get("fps")
    indices = list(range(len(images)))
    if edition.slow_fast_frames:
        indices = sampling.sample_indices(0, len(images) - 1, max(1, min(len(images), sampling.slow_fast_frame_limit(options))))
    shared = {name: value for name, value in options.items() if name not in ("type", "video", "video_url")}
    pixel_limits = sampling.FRAME_PIXEL_LIMITS if edition.slow_fast_frames else None

    def fetch(image: Any) -> Any:
        part = image if isinstance(image, Mapping) else {**shared, "image": image}
        return fetch_image(part, edition=edition.name, pixel_limits=pixel_limits, **limits)

    sampled = [images[index] for index in indices]
    decode_repeated(sampled)
    resized = map_in_threads(fetch, sampled)
    seconds = torch.tensor([(1 / fps) * index for index in indices], dtype=torch.float32) if fps else None
    if not edition.slow_fast_frames:
        if len(resized) % FRAME_FACTOR:
            resized.append(resized[-1])
        return SampledVideo(resized, seconds, fps=float(fps or DEFAULT_FPS))
    sizes = {(image.height, image.width) for image in resized}
    if len(sizes) > 1:
        raise ValueError(
            f"the images of a video must have one size, got {sorted(sizes)} (height, width) after resizing; "
            "pass resized_height and resized_width"
        )
    frames = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in resized])
    height, width = frames.shape[-2:]
    classify = SlowFastClassifier(height, width, options.get("min_frame_similarity"))
    types = torch.tensor([classify(frame) for frame in frames], dtype=torch.int32)
    fast_frames = int(types.sum())
    slow_size, fast_size = sampling.slow_fast_sizes(options, height, width, len(types) - fast_frames, fast_frames)
    return SampledVideo(frames, seconds, frame_types=types, slow_size=slow_size, fast_size=fast_size)


def _frame_range(reader: VideoReader, options: Options) -> tuple[int, int]:
    count = len(reader.times)
    if reader.is_constant_rate:
        return sampling.frame_range(options, count, reader.fps)
    start, end = options.get("video_start"), options.get("video_end")
    first = 0 if start is None else int(np.searchsorted(reader.times, start))
    last = count - 1 if end is None else int(np.searchsorted(reader.times, end, side="right")) - 1
    sampling.check_range(options, first, last, reader.times[-1])
    return first, last


def _seconds(reader: VideoReader, indices: Sequence[int]) -> torch.Tensor:
    # At a constant rate, computed as in the official package: the times in the file are rounded.
    if reader.is_constant_rate:
        return torch.tensor([(1 / reader.fps) * index for index in indices], dtype=torch.float32)
    return torch.tensor(reader.times[list(indices)], dtype=torch.float32)


def _resize_bicubic(pixels: torch.Tensor, size: Size) -> torch.Tensor:
    """Resizes to uint8 `[3, *size]`, rounded from float32 as in torchvision."""
    if pixels.shape[1:] == size:
        return pixels
    resized = torch.nn.functional.interpolate(pixels[None].float(), size, mode="bicubic", antialias=True)[0]
    return resized.clamp(0, 255).round().to(torch.uint8)
