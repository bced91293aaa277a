"""Loads images (files, URLs, PIL images, arrays, tensors) as RGB and resizes them, as `fetch_image` of `keye_vl_utils` does.

The two editions differ in transparent images and in the largest size, see `keye_kernels.editions`. Neither applies the
EXIF orientation tag: an image keeps the orientation of its stored pixels.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from keye_kernels.editions import EditionName, edition_named

from .pixels import is_pixels, to_channels_last
from .resize import smart_resize
from .sources import DOWNLOAD_TIMEOUT_SECONDS, MAX_DOWNLOAD_BYTES, describe_source, read_source

if TYPE_CHECKING:
    from PIL.Image import Image

# Older releases of Pillow open 16-bit gray images of these formats in mode I, and all do PPM.
FORMATS_WITH_16_BITS = ("PNG", "PPM")


def load_image(
    source: Any,
    *,
    edition: EditionName = "preview",
    timeout: float = DOWNLOAD_TIMEOUT_SECONDS,
    max_bytes: int = MAX_DOWNLOAD_BYTES,
) -> Image:
    """Loads an image as RGB, without resizing it.

    `source` is anything that `open_source` takes, a PIL image, or an array or tensor that `to_channels_last` takes. RGBA images
    are blended onto white ("preview") or lose their alpha channel ("1.5"). Raises FileNotFoundError, ValueError for a source that
    cannot be read (the message names it), or TypeError.
    """
    from PIL import Image

    blend_alpha = edition_named(edition).blend_alpha
    name = describe_source(source)
    if isinstance(source, Image.Image):
        return _to_rgb(source, blend_alpha, name)
    if is_pixels(source):
        return _to_rgb(Image.fromarray(to_channels_last(source)), blend_alpha, name)
    encoded = read_source(source, timeout=timeout, max_bytes=max_bytes)
    try:
        image = _open(encoded)
    except Image.DecompressionBombError as error:
        raise _bomb_error(name, error) from error
    except Exception as error:  # Pillow's plugins raise many types for a broken header
        raise ValueError(
            f"image {name} is not in a format that Pillow can read ({len(encoded)} bytes); pass a PNG, JPEG or WebP"
        ) from error
    with image:
        if image.format == "EPS":
            raise ValueError(f"image {name} is an EPS file, for which Pillow would run Ghostscript; pass a PNG, JPEG or WebP")
        return _to_rgb(image, blend_alpha, name)


def fetch_image(
    part: Mapping[str, Any],
    *,
    edition: EditionName = "preview",
    pixel_limits: tuple[float, float] | None = None,
    timeout: float = DOWNLOAD_TIMEOUT_SECONDS,
    max_bytes: int = MAX_DOWNLOAD_BYTES,
) -> Image:
    """Loads the image of one message part and resizes it (bicubic, both sides multiples of 28).

    `part` has `image` or `image_url` (a string or `{"url": ...}`), and may have the options of `size_from_options`. Raises the
    errors of `load_image`, and ValueError for an option that is out of range.
    """
    source = part["image"] if "image" in part else part.get("image_url")
    if isinstance(source, Mapping):
        source = source.get("url")
    if source is None:
        raise ValueError("an image part needs 'image' or 'image_url' with a path, URL, base64 string or image")
    image = load_image(source, edition=edition, timeout=timeout, max_bytes=max_bytes)
    height, width = size_from_options(part, image.height, image.width, edition=edition, pixel_limits=pixel_limits)
    return image.resize((width, height))


def decode_repeated(sources: Iterable[Any]) -> None:
    """Decodes the PIL images that occur several times or share a file: two threads cannot decode them at the same time.

    A source may also be a message part with `image`.
    """
    from PIL import Image as PIL

    by_file: dict[int, list[Image]] = {}
    for source in sources:
        source = source.get("image") if isinstance(source, Mapping) else source
        if isinstance(source, PIL.Image):
            file = getattr(source, "fp", None)
            by_file.setdefault(id(source if file is None else file), []).append(source)
    for images in by_file.values():
        if len(images) > 1:
            for image in images:
                # load_image reports the error
                with suppress(Exception):
                    image.load()


def size_from_options(
    part: Mapping[str, Any], height: int, width: int, *, edition: EditionName, pixel_limits: tuple[float, float] | None = None
) -> tuple[int, int]:
    """Computes `(height, width)` after resizing an image of `height` x `width` pixels with the options of a message part.

    `resized_height` and `resized_width` are limited only by the edition, as in the official packages. Otherwise `min_pixels` and
    `max_pixels` of the part take precedence over `pixel_limits`, and those over the limits of the edition.
    """
    for option in ("resized_height", "resized_width", "min_pixels", "max_pixels"):
        value = part.get(option)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value < math.inf):
            raise ValueError(f"{option} must be a positive number of at least 1, got {value!r}")
    resized_height, resized_width = part.get("resized_height"), part.get("resized_width")
    if (resized_height is None) != (resized_width is None):
        raise ValueError("resized_height and resized_width must be given together")
    edition_limits: tuple[float, float] = edition_named(edition).image_pixel_limits
    if resized_height is not None and resized_width is not None:
        return smart_resize(resized_height, resized_width, min_pixels=edition_limits[0], max_pixels=edition_limits[1])
    check_pixel_limits(part)
    low, high = pixel_limits or edition_limits
    return smart_resize(height, width, min_pixels=part.get("min_pixels") or low, max_pixels=part.get("max_pixels") or high)


def check_pixel_limits(part: Mapping[str, Any]) -> None:
    """Raises ValueError if a message part has `min_pixels` above its `max_pixels`."""
    low, high = part.get("min_pixels"), part.get("max_pixels")
    if low is not None and high is not None and low > high:
        raise ValueError(f"min_pixels={low} must not exceed max_pixels={high}")


def _open(encoded: bytes) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(encoded))
    except UnidentifiedImageError:
        # Pillow loads its plugins on demand, and overlooks those that another thread loads at the same time
        Image.init()
        return Image.open(io.BytesIO(encoded))


def _to_rgb(image: Image, blend_alpha: bool, name: str) -> Image:
    from PIL import Image

    try:
        if image.mode == "RGBA" and blend_alpha:
            background = Image.new("RGB", image.size, (255, 255, 255))
            background.paste(image, mask=image.getchannel("A"))
            return background
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in FORMATS_WITH_16_BITS):
            # Pillow's own conversion to RGB clips at 255.
            values = np.rint(np.asarray(image) / 257)
            return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
        if image.mode not in ("I", "F"):
            return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise _bomb_error(name, error) from error
    except Exception as error:  # Pillow's decoders raise many types for broken data
        raise ValueError(f"image {name} cannot be decoded ({error}); it may be truncated or damaged") from error
    raise ValueError(
        f"image {name} has mode {image.mode} (32-bit {'integers' if image.mode == 'I' else 'floating point'}), in which black "
        "and white have no defined values; convert it to 8 bits (mode L or RGB) first"
    )


def _bomb_error(name: str, error: Exception) -> ValueError:
    return ValueError(
        f"image {name} is rejected as a decompression bomb: {error}; "
        "if you trust it, raise PIL.Image.MAX_IMAGE_PIXELS before loading"
    )
