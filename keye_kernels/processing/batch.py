"""The dictionary of tensors that the processor hands to the model."""

from __future__ import annotations

from typing import Any

import torch


class BatchFeature(dict):
    """Model inputs by name, also as attributes; ``model(**inputs)`` works."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no input named {name!r}; there are {list(self)}") from None

    def to(
        self,
        device: torch.device | str | int | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> BatchFeature:
        """Moves every tensor to ``device`` and casts the floating ones to ``dtype``; changes and returns this object.

        As in transformers, a dtype may stand in the first place.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                cast = dtype if value.is_floating_point() else None
                self[name] = value.to(device=device, dtype=cast, non_blocking=non_blocking)
        return self
