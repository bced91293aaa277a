"""Copies to a GPU on a machine without one: the CPU plays the GPU, and "pinned" memory is ordinary memory that is recorded."""

from __future__ import annotations

import pytest
import torch

from keye_kernels import host_copy


class Copies:
    """The pinned tensors that were allocated, and the `(tensor, non_blocking)` of each call of `Tensor.to` with a device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pinned: list[torch.Tensor] = []
        self.copied: list[tuple[torch.Tensor, bool]] = []
        original = torch.Tensor.to

        def empty_pinned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            self.pinned.append(torch.empty(shape, dtype=dtype))
            return self.pinned[-1]

        def to(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
            if isinstance(kwargs.get("device", args[0] if args else None), torch.device):
                self.copied.append((tensor, bool(kwargs.get("non_blocking"))))
            return original(tensor, *args, **kwargs).clone()

        monkeypatch.setattr(host_copy, "_uses_pinned_memory", lambda device: True)
        monkeypatch.setattr(host_copy, "_empty_pinned", empty_pinned)
        monkeypatch.setattr(torch.Tensor, "to", to)

    def all_asynchronous(self) -> bool:
        """Whether every copy was one of a whole pinned tensor, with `non_blocking`."""
        pinned = {id(tensor) for tensor in self.pinned}
        return bool(self.copied) and all(id(tensor) in pinned and non_blocking for tensor, non_blocking in self.copied)
