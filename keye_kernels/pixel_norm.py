"""How 8-bit pixel values are normalized, for the image processor and for the vision tower. Imports nothing of the package."""

from collections.abc import Mapping
from typing import Any, NamedTuple

# Of the sizes of the numbers. Others normalize pixels to values that are not finite in float32
SMALLEST, LARGEST = 1e-6, 1e6
WITHIN = f"of a size from {SMALLEST:g} to {LARGEST:g}"


class PixelNorm(NamedTuple):
    """Normalization of 8-bit pixels, per channel: `(pixel * rescale_factor - image_mean) / image_std`."""

    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "PixelNorm":
        """Reads `preprocessor_config.json`; missing entries keep their defaults. Raises ValueError for invalid values."""
        values: dict[str, Any] = {}
        for name in ("image_mean", "image_std"):
            numbers = config.get(name)
            if numbers is not None:
                smallest = SMALLEST if name == "image_std" else 0
                is_list = isinstance(numbers, (list, tuple)) and len(numbers) == 3
                if not is_list or not all(_is_within(number, smallest) for number in numbers):
                    expected = f"3 numbers other than 0, {WITHIN}" if smallest else f"3 numbers up to {LARGEST:g}"
                    raise ValueError(f"{name} in preprocessor_config.json must hold {expected}, got {numbers!r:.100}")
                values[name] = tuple(float(number) for number in numbers)
        factor = config.get("rescale_factor")
        if factor is not None:
            if not _is_within(factor, SMALLEST):
                expected = f"a number other than 0, {WITHIN}"
                raise ValueError(f"rescale_factor in preprocessor_config.json must be {expected}, got {factor!r:.100}")
            values["rescale_factor"] = factor
        return cls(**values)


def _is_within(number: Any, smallest: float) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and smallest <= abs(number) <= LARGEST
