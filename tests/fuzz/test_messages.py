"""Conversations with other types, nesting and template arguments; and arguments of the processor's call."""

from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from keye_kernels.editions import EDITIONS
from keye_kernels.processing import KeyeProcessor
from keye_kernels.small import ASSETS
from tests.helpers.small_tokenizer import write_processor_files

from .harness import check, fuzz
from .json_values import SCALARS, VALUES, damaged, sampled_from_all

IMAGE = Image.new("RGB", (56, 56), "red")
CLIP = np.zeros((4, 28, 28, 3), np.uint8)
# Only "image", "image_url" and "video" may be opened; none of these is
URL = "http://127.0.0.1:9/x"
ODD = st.one_of(
    VALUES, st.sampled_from([IMAGE, CLIP, torch.zeros(3), b"abc", bytearray(b"a"), object(), {1}, (), ("a",), len, URL])
)
SOURCES = sampled_from_all(
    [IMAGE, CLIP, CLIP[0], str(ASSETS / "image.png"), str(ASSETS / "clip.mp4"), "ftp://127.0.0.1/x", "file://127.0.0.1/x"],
    ["//127.0.0.1/x", "http:/127.0.0.1", "rtsp://127.0.0.1/x", "udp://127.0.0.1:45673", "concat:/etc/passwd", "pipe:0", "-"],
    ["/dev/tty", "data:,x", "tcp://x"],
)
BASE = [
    {"role": "system", "content": "s"},
    {
        "role": "user",
        "content": [
            {"type": "image", "image": "IMAGE", "min_pixels": 784, "max_pixels": 3136},
            {"type": "image_url", "image_url": {"url": "IMAGE"}},
            {"type": "video", "video": "CLIP", "fps": 2.0},
            {"type": "text", "text": "x"},
        ],
    },
    {"role": "assistant", "content": [{"type": "text", "text": URL}], "tool_calls": [], "name": URL},
    {"role": "user", "content": "y"},
]


@st.composite
def conversations(draw: Any) -> Any:
    """BASE with damage of its structure; then images and other objects in the place of some strings."""
    value = draw(damaged(BASE) if draw(st.integers(0, 9)) else st.just(BASE))
    return _place(draw, [value, value] if draw(st.integers(0, 4)) == 0 else value)


def _place(draw: Any, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _place(draw, item) for key, item in value.items()}
    if isinstance(value, list):
        return [_place(draw, item) for item in value]
    if value == "IMAGE":
        return draw(SOURCES) if draw(st.integers(0, 5)) == 0 else IMAGE
    if value == "CLIP":
        return draw(SOURCES) if draw(st.integers(0, 5)) == 0 else CLIP
    return draw(ODD) if draw(st.integers(0, 60)) == 0 else value


_PROCESSORS: dict[str, KeyeProcessor] = {}


def processor_of(edition: Any, tmp_path_factory: Any) -> KeyeProcessor:
    if edition not in _PROCESSORS:
        folder = write_processor_files(tmp_path_factory.mktemp("processor"), edition)
        _PROCESSORS[edition] = KeyeProcessor.from_pretrained(folder)
    return _PROCESSORS[edition]


EDITION = st.sampled_from(list(EDITIONS))
ARGUMENTS = st.fixed_dictionaries(
    {"tokenize": st.sampled_from([True, True, True, False])},
    optional={
        "add_generation_prompt": st.booleans(),
        "thinking": st.sampled_from(["think", "no_think", "auto", None, "", 1, []]),
        "continue_final_message": st.booleans(),
        "tools": st.sampled_from([None, [], [{}], {}, "x", 1, [1]]),
        "chat_template": st.sampled_from([None, "", "{{ messages }}", "{{", "{{ messages[9].x.y }}", 1, b"x", {}]),
        "return_dict": st.booleans(),
        "return_tensors": st.sampled_from(["pt", "np", None, 1, []]),
        "processor_kwargs": st.sampled_from([None, {}, {"padding_side": "right"}, {"x": 1}, [], 1, "x", {1: 2}, {"padding": []}]),
        "add_vision_id": st.booleans(),
        "x": st.just(1),
    },
)


@fuzz(105)
@given(messages=conversations(), arguments=ARGUMENTS, edition=EDITION)
def test_messages(messages: Any, arguments: dict[str, Any], edition: Any, tmp_path_factory: Any) -> None:
    processor = processor_of(edition, tmp_path_factory)
    check(
        lambda: processor.apply_chat_template(messages, **arguments),
        expected=(ValueError, TypeError, FileNotFoundError),
    )


PROMPTS = {
    "text": "x",
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
}
PER_VIDEO = st.one_of(
    SCALARS, st.lists(SCALARS, max_size=3), st.lists(st.lists(SCALARS | st.floats(0, 9), max_size=5), max_size=2)
)
PER_VIDEO |= st.sampled_from(
    [torch.tensor([0, 1, 1, 1]), torch.zeros(4), torch.zeros(1, 4), torch.zeros(2, 2, 2), np.zeros(4), [0, 1, 1, 1], [56]]
)
CALL = st.fixed_dictionaries(
    {},
    optional={name: PER_VIDEO for edition in EDITIONS.values() for name in edition.video_kwargs}
    | {
        "padding": st.sampled_from([True, False, "longest", "x", None, 1, []]),
        "padding_side": st.sampled_from(["left", "right", None, "x", []]),
        "return_tensors": st.sampled_from(["pt", None, [], 1]),
        "pixel_dtype": st.sampled_from(["float32", "uint8", "x", None, torch.uint8, []]),
    },
)
# Of a call, the video arguments of one edition only: those of the other are refused first
VISION = st.one_of(
    st.none(),
    st.sampled_from([IMAGE, [IMAGE], [[IMAGE]], [CLIP], CLIP, [[IMAGE, IMAGE]], [], [[]], [None], 1, "x", {}, object()]),
)


@fuzz(105)
@given(
    parts=st.lists(st.sampled_from(list(PROMPTS)), min_size=1, max_size=3),
    as_text=st.sampled_from(["string", "string", "string", "list", "odd"]),
    odd=ODD,
    images=VISION,
    videos=VISION,
    arguments=CALL,
    is_matching=st.sampled_from([True, True, True, False]),
    edition=EDITION,
)
def test_processor_call(
    parts: list[str], as_text: str, odd: Any, images: Any, videos: Any, arguments: dict[str, Any], is_matching: bool,
    edition: Any, tmp_path_factory: Any,
) -> None:  # fmt: skip
    processor = processor_of(edition, tmp_path_factory)
    text: Any = "".join(PROMPTS[part] for part in parts)
    if is_matching:
        images, videos = [IMAGE] * parts.count("image"), [CLIP] * parts.count("video")
        names = EDITIONS[edition].video_kwargs
        others = {name for other in EDITIONS.values() for name in other.video_kwargs} - set(names)
        arguments = {name: value for name, value in arguments.items() if name not in others}
    text = {"string": text, "list": [text, "x"], "odd": odd}[as_text]
    output = check(
        lambda: processor(text, images=images, videos=videos, **arguments), expected=(ValueError, TypeError, FileNotFoundError)
    )
    if isinstance(output, dict):
        assert all(tensor.isfinite().all() for tensor in output.values())


@fuzz(30)
@given(ids=ODD | st.lists(ODD, max_size=3) | st.lists(st.integers(-2, 400), max_size=5), batch=st.booleans(), skip=st.booleans())
def test_decode(ids: Any, batch: bool, skip: bool, tmp_path_factory: Any) -> None:
    processor = processor_of("preview", tmp_path_factory)
    decode = processor.batch_decode if batch else processor.decode
    check(lambda: decode(ids, skip_special_tokens=skip))
