"""Videos: damaged files of several containers, files of demuxers that open sockets or other files, arrays, and options."""

import os
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from keye_kernels.editions import EDITIONS
from keye_kernels.processing.videos import SampledVideo, fetch_video
from keye_kernels.small import ASSETS
from tests.helpers.video_clips import encode_clip

from .harness import check, fuzz
from .json_values import SCALARS, damaged_bytes
from .test_images import SOURCE, arrays

EDITION = st.sampled_from(list(EDITIONS))
SIZE = {"num_frames": 8, "height": 32, "width": 32}
CLIPS = [
    (ASSETS / "clip.mp4").read_bytes(),
    *(encode_clip(**SIZE, container=name) for name in ("mp4", "mkv", "ts", "h264", "nut")),
    *(
        encode_clip(**SIZE, container="avi", codec="mpeg4"),
        encode_clip(**SIZE, container="avi", codec="mjpeg", pix_fmt="yuvj420p"),
    ),
    encode_clip(**SIZE, container="mp4", movflags="frag_keyframe+empty_moov"),
    encode_clip(**SIZE, container="mp4", pts=[0, 40, 80, 500, 540, 1000, 1040, 1080]),
    encode_clip(**SIZE, container="mp4", rotation=90),
]
OTHER_DEMUXERS = [
    b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 45672 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n",
    b"ffconcat version 1.0\nfile /etc/passwd\n",
    b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>http://127.0.0.1:9/</BaseURL></MPD>',
    b"RTSP/1.0 200 OK\r\n\r\n",
    b"[playlist]\nFile1=http://127.0.0.1:9/x\n",
    b"\x00" * 3000,
    b"RIFF\xff\xff\xff\xffAVI LIST",
    b"GIF89a",
    b"YUV4MPEG2 W999999 H999999 F30:1\nFRAME\n",
    b"<SEQ>\n0 1\n",
]


def open_sockets() -> int:
    """FFmpeg opens sockets without Python, so the audit hook of the harness does not see them."""
    names = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    return sum(os.readlink(name).startswith("socket:") for name in names if os.path.islink(name))


def check_fetch(part: dict[str, Any], edition: Any) -> None:
    before = open_sockets()
    video = check(lambda: fetch_video(part, edition=edition), expected=(ValueError, TypeError, FileNotFoundError))
    assert open_sockets() == before
    if isinstance(video, SampledVideo):
        assert len(video.frames) > 0 and (video.seconds is None or video.seconds.isfinite().all())


@fuzz(95)
@given(content=st.sampled_from(CLIPS).flatmap(damaged_bytes), edition=EDITION)
def test_damaged_files(content: bytes, edition: Any) -> None:
    check_fetch({"video": content}, edition)


@fuzz(30)
@given(
    content=st.sampled_from(OTHER_DEMUXERS).flatmap(lambda content: st.just(content) | damaged_bytes(content)), edition=EDITION
)
def test_other_demuxers(content: bytes, edition: Any) -> None:
    check_fetch({"video": content}, edition)


POSITIVE = ("fps", "nframes", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels", "video_total_pixels")
OPTIONS = (*POSITIVE, "video_start", "video_end", "min_frame_similarity", "resized_height", "resized_width")
# Larger sizes are legal and only take time
OPTION_VALUES = (
    SCALARS.filter(lambda x: not (type(x) in (int, float) and 10**6 < x < 10**12)) | st.integers(-5, 3000) | st.floats(-1, 99)
)


@fuzz(55)
@given(options=st.dictionaries(st.sampled_from(OPTIONS), OPTION_VALUES, max_size=4), clip=st.sampled_from(CLIPS), edition=EDITION)
def test_options(options: dict[str, Any], clip: bytes, edition: Any) -> None:
    check_fetch({"video": clip, **options}, edition)


FRAMES = arrays() | SCALARS | st.sampled_from([SOURCE, SOURCE.resize((28, 28)), {"image": SOURCE}, {}, b"", [SOURCE], object()])


@st.composite
def clips_in_memory(draw: Any) -> Any:
    frame = draw(FRAMES)
    count = draw(st.integers(0, 4))
    kind = draw(st.sampled_from(["list", "mixed", "tuple", "array", "tensor"]))
    if kind == "list":
        return [frame] * count
    if kind == "mixed":
        return [frame, draw(FRAMES)]
    if kind == "tuple":
        return (frame,) * count
    if not isinstance(frame, np.ndarray) or frame.dtype.kind not in "biufc":
        return frame
    stacked = np.stack([frame] * max(count, 1))[: max(count, 0)]
    return (
        stacked
        if kind == "array"
        else torch.from_numpy(stacked.astype(np.uint8) if stacked.dtype.kind == "u" else stacked.copy())
    )


@fuzz(50)
@given(video=clips_in_memory(), fps=st.none() | OPTION_VALUES, edition=EDITION)
def test_arrays_and_lists(video: Any, fps: Any, edition: Any) -> None:
    check_fetch({"video": video, "fps": fps}, edition)
