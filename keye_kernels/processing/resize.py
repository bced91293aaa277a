"""Sizes of resized pictures: both sides become multiples of 28 pixels, the area stays between two limits.

The helper package and the image processor of Keye each have their own rule, and both run, one after the other.
"""

import math

FACTOR = 28
MAX_ASPECT_RATIO = 200


def smart_resize(
    height: float, width: float, *, min_pixels: float, max_pixels: float, factor: int = FACTOR
) -> tuple[int, int]:
    """Size that ``keye_vl_utils`` gives a picture; the Preview and the 1.5 edition agree.

    As in the official package, a picture shrunk to ``max_pixels`` may end up slightly below ``min_pixels``.

    Args:
        height, width: size of the picture in pixels.
        min_pixels, max_pixels: limits of ``height * width`` of the result.
        factor: both sides of the result are multiples of it.

    Returns:
        ``(height, width)``.

    Raises:
        ValueError: a size or limit that is not positive, or one side more than 200 times the other.
    """
    _check_sizes(height, width, min_pixels, max_pixels)
    _check_aspect_ratio(height, width)
    resized_height, resized_width = _round_to_limits(
        height,
        width,
        max(factor, round(height / factor) * factor),
        max(factor, round(width / factor) * factor),
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        factor=factor,
    )
    return max(resized_height, factor), max(resized_width, factor)


def smart_resize_processor(
    height: float, width: float, *, min_pixels: float, max_pixels: float, factor: int = FACTOR
) -> tuple[int, int]:
    """Size that Keye's image processor gives a picture: sides below ``factor`` are lifted to it first.

    The official function may return a side of 0 where ``max_pixels`` is small; this one raises.

    Args, Returns: as for :func:`smart_resize`.

    Raises:
        ValueError: as for :func:`smart_resize`, or ``max_pixels`` leaves no room for the picture's shorter side.
    """
    _check_sizes(height, width, min_pixels, max_pixels)
    lifted_height, lifted_width = height, width
    if lifted_height < factor:
        lifted_height, lifted_width = factor, round(lifted_width * factor / lifted_height)
    if lifted_width < factor:
        lifted_height, lifted_width = round(lifted_height * factor / lifted_width), factor
    _check_aspect_ratio(lifted_height, lifted_width)
    resized = _round_to_limits(
        lifted_height,
        lifted_width,
        round(lifted_height / factor) * factor,
        round(lifted_width / factor) * factor,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        factor=factor,
    )
    if 0 in resized:
        raise ValueError(
            f"max_pixels={max_pixels} is too small for a picture of {height}x{width} (height x width): its shorter "
            f"side would fall below {factor} pixels; raise max_pixels or crop the picture"
        )
    return resized


def _round_to_limits(
    height: float,
    width: float,
    rounded_height: int,
    rounded_width: int,
    *,
    min_pixels: float,
    max_pixels: float,
    factor: int,
) -> tuple[int, int]:
    if rounded_height * rounded_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        return math.floor(height / shrink / factor) * factor, math.floor(width / shrink / factor) * factor
    if rounded_height * rounded_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return rounded_height, rounded_width


def _check_sizes(height: float, width: float, min_pixels: float, max_pixels: float) -> None:
    if height <= 0 or width <= 0:
        raise ValueError(f"height and width must be positive, got {height}x{width}")
    if min_pixels <= 0 or max_pixels <= 0:
        raise ValueError(
            f"min_pixels and max_pixels must be positive, got min_pixels={min_pixels}, max_pixels={max_pixels}"
        )


def _check_aspect_ratio(height: float, width: float) -> None:
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ValueError(
            f"a picture's longer side may be at most {MAX_ASPECT_RATIO} times the shorter one, "
            f"got {height}x{width} (height x width); crop or split it"
        )
