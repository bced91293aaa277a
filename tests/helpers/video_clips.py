"""Encodes small videos with PyAV, and decodes all frames of one."""

import io
import tempfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

CODEC_OPTIONS = {
    "libx264": {"preset": "ultrafast"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:keyint=12"},
    "libvpx-vp9": {"cpu-used": "8", "deadline": "realtime"},
}


def scene_frame(index: int, height: int, width: int, scene_length: int = 12) -> np.ndarray:
    """A moving square on a background that alternates between gray and red every ``scene_length`` frames."""
    frame = np.full((height, width, 3), 128, np.uint8)
    if (index // scene_length) % 2:
        frame[:] = (230, 30, 40)
    left = index * 2 % max(1, width - 8)
    frame[height // 4 : height // 2, left : left + 8] = (20, 220, index % 256)
    return frame


def encode_clip(
    num_frames: int = 30,
    *,
    fps: Fraction | int = 10,
    height: int = 64,
    width: int = 96,
    codec: str = "libx264",
    container: str = "mp4",
    pts: Sequence[int] | None = None,
    rotation: int = 0,
    pix_fmt: str = "yuv420p",
    draw: Callable[[int, int, int], np.ndarray] = scene_frame,
    **options: str,
) -> bytes:
    """A video as bytes. ``pts`` in milliseconds give a variable frame rate; ``rotation`` is in degrees counterclockwise."""
    av = pytest.importorskip("av")
    try:
        av.Codec(codec, "w")
    except Exception:
        pytest.skip(f"this build of PyAV has no encoder {codec}")
    muxer = {name: options.pop(name) for name in ("movflags",) if name in options}
    name = {"mkv": "matroska", "ts": "mpegts"}.get(container, container)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip"
        with av.open(str(path), "w", format=name, container_options=muxer) as output:
            stream = output.add_stream(codec, rate=fps, options={**CODEC_OPTIONS.get(codec, {}), **options})
            stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
            stream.codec_context.thread_count = 1
            if rotation and not hasattr(stream, "set_display_rotation"):
                pytest.skip("writing a rotation needs PyAV 18")
            if rotation:
                stream.set_display_rotation(rotation)
            if pts is not None:
                stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
            for index in range(num_frames):
                frame = av.VideoFrame.from_ndarray(draw(index, height, width), format="rgb24")
                if pts is not None:
                    frame.pts, frame.time_base = pts[index], Fraction(1, 1000)
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
        return path.read_bytes()


def decode_clip(content: bytes) -> list[np.ndarray]:
    """All frames, uint8 ``[H, W, 3]``, rotated as the metadata says."""
    import av

    with av.open(io.BytesIO(content)) as container:
        return [np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)) for frame in container.decode(video=0)]
