"""Sizes of resized images: both sides become multiples of 28 pixels, and the area stays within limits.

`keye_vl_utils` and the image processor of Keye have a rule each. Both are applied, one after the other. The rules are in
docs/models/keye_vl_1_5.md, "Smart resize", and docs/models/keye_vl_preview.md, "Images".
"""

import math

from keye_kernels.editions import TOKEN_SIDE_PIXELS

MAX_ASPECT_RATIO = 200
# The editions have at most 16 million. Only a senseless min_pixels, which enlarges images, exceeds this.
MAX_RESIZED_PIXELS = 2**27


def smart_resize(
    height: float, width: float, *, min_pixels: float, max_pixels: float, factor: int = TOKEN_SIDE_PIXELS
) -> tuple[int, int]:
    """Computes the size `(height, width)` to which `keye_vl_utils` resizes an image; the same for both editions.

    Both sides are multiples of `factor`. As in the official package, an image shrunk to `max_pixels` may end up slightly below
    `min_pixels`. Raises ValueError if a size or limit is not positive, or one side is more than 200 times the other.
    """
    _check_sizes(height, width, min_pixels, max_pixels)
    resized_height, resized_width = _round_to_limits(height, width, min_pixels, max_pixels, factor)
    return max(resized_height, factor), max(resized_width, factor)


def smart_resize_processor(
    height: float, width: float, *, min_pixels: float, max_pixels: float, factor: int = TOKEN_SIDE_PIXELS
) -> tuple[int, int]:
    """Computes the size `(height, width)` to which Keye's image processor resizes an image.

    Unlike `smart_resize`, it first enlarges images with a side shorter than `factor`, keeping the aspect ratio. The official
    function can return a side of 0 for a small `max_pixels`; this one raises ValueError.
    """
    _check_sizes(height, width, min_pixels, max_pixels)
    enlarged_height, enlarged_width = height, width
    if enlarged_height < factor:
        enlarged_height, enlarged_width = factor, round(enlarged_width * factor / enlarged_height)
    if enlarged_width < factor:
        enlarged_height, enlarged_width = round(enlarged_height * factor / enlarged_width), factor
    resized = _round_to_limits(enlarged_height, enlarged_width, min_pixels, max_pixels, factor)
    if 0 in resized:
        raise ValueError(
            f"max_pixels={max_pixels} is too small for an image of {height}x{width} (height x width): its shorter "
            f"side would fall below {factor} pixels; raise max_pixels or crop the image"
        )
    return resized


def _round_to_limits(height: float, width: float, min_pixels: float, max_pixels: float, factor: int) -> tuple[int, int]:
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ValueError(
            f"the longer side of an image must be at most {MAX_ASPECT_RATIO} times the shorter one, "
            f"got {height}x{width} (height x width); crop or split the image"
        )
    rounded_height = max(factor, round(height / factor) * factor)
    rounded_width = max(factor, round(width / factor) * factor)
    if rounded_height * rounded_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        return math.floor(height / shrink / factor) * factor, math.floor(width / shrink / factor) * factor
    if rounded_height * rounded_width < min_pixels:
        if min_pixels > MAX_RESIZED_PIXELS:
            raise ValueError(f"min_pixels must be at most {MAX_RESIZED_PIXELS}, got {min_pixels}")
        enlarge = math.sqrt(min_pixels / (height * width))
        return math.ceil(height * enlarge / factor) * factor, math.ceil(width * enlarge / factor) * factor
    return rounded_height, rounded_width


def _check_sizes(height: float, width: float, min_pixels: float, max_pixels: float) -> None:
    if height <= 0 or width <= 0:
        raise ValueError(f"height and width must be positive, got {height}x{width}")
    if min_pixels <= 0 or max_pixels <= 0:
        raise ValueError(f"min_pixels and max_pixels must be positive, got min_pixels={min_pixels}, max_pixels={max_pixels}")
