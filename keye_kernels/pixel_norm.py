"""How 8-bit pixel values are normalized, for the image processor and for the vision tower. Imports nothing of the package."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class PixelNorm(NamedTuple):
    """Normalization of 8-bit pixels, per channel: `(pixel * rescale_factor - image_mean) / image_std`."""

    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "PixelNorm":
        """Reads `preprocessor_config.json`; missing entries keep their defaults. Raises ValueError if there are not 3 numbers."""
        values: dict[str, Any] = {}
        for name in ("image_mean", "image_std"):
            if config.get(name) is not None:
                if len(config[name]) != 3:
                    raise ValueError(f"{name} in preprocessor_config.json must hold 3 numbers, got {config[name]}")
                values[name] = tuple(float(number) for number in config[name])
        if config.get("rescale_factor") is not None:
            values["rescale_factor"] = config["rescale_factor"]
        return cls(**values)
