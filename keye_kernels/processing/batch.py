"""The dictionary of tensors that the processor returns."""

from __future__ import annotations

from typing import Any

import torch


class BatchFeature(dict):
    """Model inputs by name, also readable as attributes. Call the model with `model(**inputs)`."""

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
        """Moves all tensors to a device and casts the floating-point ones, in place.

        Args:
            device: target device; None leaves the tensors where they are. As in transformers, a dtype may be passed here.
            dtype: target dtype of the floating-point tensors; None keeps their dtype.
            non_blocking: copy without waiting, as in `torch.Tensor.to`.

        Returns:
            This object.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                target_dtype = dtype if value.is_floating_point() else None
                self[name] = value.to(device=device, dtype=target_dtype, non_blocking=non_blocking)
        return self
