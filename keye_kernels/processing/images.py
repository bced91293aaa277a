"""Pictures from anywhere: path, URL, base64, bytes, PIL or numpy, always to an RGB picture.

Two editions of ``keye_vl_utils`` are followed: "preview" puts transparent pictures on white, "1.5" drops the alpha
channel. Neither reads the EXIF orientation tag, so a picture stands as its pixels are stored.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .resize import FACTOR, smart_resize
from .sources import DOWNLOAD_TIMEOUT, MAX_DOWNLOAD_BYTES, describe_source, read_source

if TYPE_CHECKING:
    from PIL.Image import Image

Edition = Literal["preview", "1.5"]

PIXELS_PER_TOKEN = FACTOR * FACTOR
# Smallest and largest picture, in pixels, before the processor's own (tighter) limits apply.
IMAGE_PIXEL_LIMITS: dict[str, tuple[int, int]] = {
    "preview": (4 * PIXELS_PER_TOKEN, 16384 * PIXELS_PER_TOKEN),
    "1.5": (4 * PIXELS_PER_TOKEN, 20480 * PIXELS_PER_TOKEN),
}


def check_edition(edition: str) -> None:
    """Raises ValueError unless ``edition`` is "preview" or "1.5"."""
    if edition not in IMAGE_PIXEL_LIMITS:
        raise ValueError(f"edition must be one of {sorted(IMAGE_PIXEL_LIMITS)}, got {edition!r}")


def load_image(
    source: Any,
    *,
    edition: Edition = "preview",
    timeout: float = DOWNLOAD_TIMEOUT,
    max_bytes: int = MAX_DOWNLOAD_BYTES,
) -> Image:
    """Loads a picture as RGB, as ``fetch_image`` of the official packages does.

    The EXIF orientation tag is ignored, as in the official code. Transparency in RGBA pictures is blended onto white
    ("preview") or dropped ("1.5"); every other mode goes through Pillow's ``convert("RGB")``.

    Args:
        source: path, ``file://`` or ``http(s)://`` address, ``data:image...;base64,`` string, the bytes of an image
            file, a PIL picture, or a uint8 numpy array ``[H, W, 3]`` (``[H, W, 4]`` with alpha).
        edition: whose rule for transparency applies.
        timeout: seconds a download may take in all.
        max_bytes: size a download may have.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the source cannot be fetched or is no readable picture; the message names it.
        TypeError: a source of another type.
    """
    from PIL import Image

    check_edition(edition)
    name = describe_source(source)
    if isinstance(source, Image.Image):
        return _to_rgb(source, edition, name)
    if isinstance(source, np.ndarray):
        return _to_rgb(_image_from_array(source), edition, name)
    encoded = read_source(source, timeout=timeout, max_bytes=max_bytes)
    try:
        image = Image.open(io.BytesIO(encoded))
    except Image.DecompressionBombError as error:
        raise _bomb_error(name, error) from error
    except Exception as error:
        raise ValueError(
            f"image {name} is not in a format that Pillow can read ({len(encoded)} bytes); pass a PNG, JPEG or WebP"
        ) from error
    with image:
        return _to_rgb(image, edition, name)


def fetch_image(
    part: Mapping[str, Any],
    *,
    edition: Edition = "preview",
    pixel_limits: tuple[float, float] | None = None,
    timeout: float = DOWNLOAD_TIMEOUT,
    max_bytes: int = MAX_DOWNLOAD_BYTES,
) -> Image:
    """Loads and resizes the picture of one message part (bicubic, both sides multiples of 28).

    Args:
        part: has ``image`` or ``image_url`` (a string or ``{"url": ...}``), and may have ``resized_height`` with
            ``resized_width``, ``min_pixels`` and ``max_pixels``.
        edition: whose limits and rule for transparency apply.
        pixel_limits: smallest and largest area if the part sets none; the edition's image limits by default.
        timeout, max_bytes: as for :func:`load_image`.

    Returns:
        An RGB picture.

    Raises:
        ValueError, TypeError, FileNotFoundError: as for :func:`load_image`, or an option out of range.
    """
    check_edition(edition)
    source = part["image"] if "image" in part else part.get("image_url")
    if isinstance(source, Mapping):
        source = source.get("url")
    if source is None:
        raise ValueError("an image part needs 'image' or 'image_url' with a path, address, base64 string or picture")
    image = load_image(source, edition=edition, timeout=timeout, max_bytes=max_bytes)
    height, width = resized_size(part, image.height, image.width, edition=edition, pixel_limits=pixel_limits)
    return image.resize((width, height))


def resized_size(
    part: Mapping[str, Any],
    height: int,
    width: int,
    *,
    edition: Edition,
    pixel_limits: tuple[float, float] | None = None,
) -> tuple[int, int]:
    """``(height, width)`` that a part's options give a picture of ``height x width``.

    ``resized_height`` and ``resized_width`` win over everything else; only the edition's image limits hold for them,
    as in the official packages. Otherwise ``min_pixels`` and ``max_pixels`` win over ``pixel_limits``.
    """
    for option in ("resized_height", "resized_width", "min_pixels", "max_pixels"):
        value = part.get(option)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0):
            raise ValueError(f"{option} must be a positive number, got {value!r}")
    resized = part.get("resized_height"), part.get("resized_width")
    if (resized[0] is None) != (resized[1] is None):
        raise ValueError("resized_height and resized_width must be given together")
    if resized[0] is not None:
        height, width = resized
        min_pixels, max_pixels = IMAGE_PIXEL_LIMITS[edition]
    else:
        min_pixels, max_pixels = pixel_limits or IMAGE_PIXEL_LIMITS[edition]
        min_pixels = part.get("min_pixels") or min_pixels
        max_pixels = part.get("max_pixels") or max_pixels
    return smart_resize(height, width, min_pixels=min_pixels, max_pixels=max_pixels)


def _image_from_array(array: np.ndarray) -> Image:
    from PIL import Image

    if array.dtype != np.uint8:
        raise TypeError(f"a numpy image must be uint8, got {array.dtype}")
    if array.ndim != 3 or array.shape[-1] not in (3, 4) or 0 in array.shape:
        raise ValueError(f"a numpy image must have shape [H, W, 3] (RGB) or [H, W, 4] (RGBA), got {list(array.shape)}")
    return Image.fromarray(np.ascontiguousarray(array))


def _to_rgb(image: Image, edition: Edition, name: str) -> Image:
    from PIL import Image

    try:
        if image.mode == "RGBA" and edition == "preview":
            background = Image.new("RGB", image.size, (255, 255, 255))
            background.paste(image, mask=image.getchannel("A"))
            return background
        return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise _bomb_error(name, error) from error
    except Exception as error:
        raise ValueError(f"image {name} cannot be decoded ({error}); it may be truncated or damaged") from error


def _bomb_error(name: str, error: Exception) -> ValueError:
    return ValueError(
        f"image {name} is refused as a decompression bomb: {error}; "
        "if you trust it, raise PIL.Image.MAX_IMAGE_PIXELS before loading"
    )
