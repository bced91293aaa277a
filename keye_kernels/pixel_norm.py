"""How 8-bit pixel values are normalized, for the image processor and for the vision tower. Imports nothing of the package."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple


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
                is_valid = isinstance(numbers, (list, tuple)) and len(numbers) == 3 and all(map(_is_finite, numbers))
                if not is_valid or (name == "image_std" and 0 in numbers):
                    expected = "3 numbers other than 0" if name == "image_std" else "3 numbers"
                    raise ValueError(f"{name} in preprocessor_config.json must hold {expected}, got {numbers}")
                values[name] = tuple(float(number) for number in numbers)
        factor = config.get("rescale_factor")
        if factor is not None:
            if not _is_finite(factor) or factor == 0:
                raise ValueError(f"rescale_factor in preprocessor_config.json must be a number other than 0, got {factor!r}")
            values["rescale_factor"] = factor
        return cls(**values)


def _is_finite(number: Any) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)
