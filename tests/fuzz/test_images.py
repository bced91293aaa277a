"""Images: files with damaged bytes, arrays and tensors of any dtype and shape, every mode of Pillow, and options."""

import io
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from keye_kernels.editions import EDITIONS
from keye_kernels.processing.images import fetch_image
from keye_kernels.small import ASSETS, small_processor

from .harness import check, fuzz
from .json_values import SCALARS, damaged_bytes

PROCESSOR = small_processor()
PROMPT = "<|vision_start|><|image_pad|><|vision_end|>x"
MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "RGBX", "RGBa", "La", "I;16", "I;16B")
FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    "ICO",
    "TGA",
    "PCX",
    "JPEG2000",
    "DDS",
    "SGI",
    "IM",
    "MSP",
    "XBM",
    "EPS",
    "PDF",
    "AVIF",
    "QOI",
)
SOURCE = Image.open(ASSETS / "image.png").convert("RGB").resize((40, 30))


def encode(name: str) -> bytes | None:
    buffer = io.BytesIO()
    for mode in ("RGB", "1"):
        try:
            SOURCE.convert(mode).save(buffer, name)
            return buffer.getvalue()
        except (OSError, KeyError, ValueError):
            continue
    return None


FILES = [content for content in map(encode, FORMATS) if content] + [(ASSETS / "image.png").read_bytes()]
EDITION = st.sampled_from(list(EDITIONS))


def check_fetch(part: dict[str, Any], edition: Any) -> None:
    image = check(lambda: fetch_image(part, edition=edition))
    if isinstance(image, Image.Image):
        assert image.mode == "RGB" and image.width % 28 == image.height % 28 == 0


@fuzz(80)
@given(content=st.sampled_from(FILES).flatmap(damaged_bytes), edition=EDITION)
def test_damaged_files(content: bytes, edition: Any) -> None:
    check_fetch({"image": content}, edition)


@fuzz(50)
@given(
    mode=st.sampled_from(MODES),
    size=st.tuples(*[st.sampled_from([0, 1, 2, 27, 28, 29, 300])] * 2),
    info=st.dictionaries(
        st.sampled_from(["transparency", "icc_profile", "exif", "gamma"]), SCALARS | st.just(b"\0" * 9), max_size=2
    ),
    edition=EDITION,
)
def test_modes(mode: str, size: tuple[int, int], info: dict[str, Any], edition: Any) -> None:
    image = Image.new(mode, size)
    image.info.update(info)
    check_fetch({"image": image}, edition)


@st.composite
def arrays(draw: Any) -> np.ndarray:
    dtype = draw(
        st.sampled_from(["u1"] * 6 + ["i1", "u2", "i4", "i8", "u8", "f2", "f4", "f8", "c8", "?", "U2", "O", "M8[s]", "S3", "V4"])
    )
    shape = draw(
        st.one_of(
            st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 4)),
            st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 40)),
            st.lists(st.integers(0, 5), max_size=5).map(tuple),
        )
    )
    array = np.zeros(shape, dtype)
    if array.dtype.kind in "iufc" and array.size:
        array.flat[0] = draw(st.sampled_from([0, 1, 127, 255 if dtype != "i1" else 1]))
    if array.dtype.kind == "f" and array.size:
        array.flat[-1] = draw(st.sampled_from([0.5, -1.0, np.nan, np.inf, 255.0, 256.0]))
    view = draw(st.sampled_from([lambda x: x, np.transpose, lambda x: x[..., ::-1], lambda x: x[::2], np.asfortranarray]))
    return view(array) if array.ndim else array


@fuzz(60)
@given(array=arrays(), as_tensor=st.booleans(), as_batch=st.booleans())
def test_arrays(array: np.ndarray, as_tensor: bool, as_batch: bool) -> None:
    image: Any = array
    if as_tensor:
        try:
            image = torch.from_numpy(array.copy())
        except TypeError:
            return
    output = check(lambda: PROCESSOR(PROMPT, images=[image] if as_batch else image))
    if isinstance(output, dict):
        assert output["pixel_values"].isfinite().all()


OPTIONS = ("resized_height", "resized_width", "min_pixels", "max_pixels")


@fuzz(60)
@given(
    options=st.dictionaries(st.sampled_from(OPTIONS), SCALARS | st.integers(-100, 5000) | st.floats(0, 5000), max_size=4),
    source=SCALARS
    | st.sampled_from([SOURCE, b"", bytearray(FILES[0]), [SOURCE], {"url": SOURCE}, {}, SOURCE.size, object()])
    | st.sampled_from(
        ["data:image;base64,", "data:image;base64,AAAA", "data:,", "file://", "file:///dev/zero", "/dev/stdin", "."]
    ),
    key=st.sampled_from(["image", "image_url"]),
    size=st.sampled_from([(1, 1), (1, 199), (1, 201), (300, 2), (40, 40)]),
    edition=EDITION,
)
def test_options(options: dict[str, Any], source: Any, key: str, size: tuple[int, int], edition: Any) -> None:
    for value in (source, SOURCE.resize(size)):
        # Large sizes are legal and only take time
        small = {
            name: option for name, option in options.items() if not (isinstance(option, (int, float)) and 10**6 < option < 10**12)
        }
        check_fetch_or_missing({key: value, **small}, edition)


def check_fetch_or_missing(part: dict[str, Any], edition: Any) -> None:
    check(lambda: fetch_image(part, edition=edition), expected=(ValueError, TypeError, FileNotFoundError))
