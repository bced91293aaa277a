"""Copies to a GPU on a machine without one: the CPU plays the GPU, and "pinned" memory is ordinary memory that is recorded."""

from __future__ import annotations

import pytest
import torch

from keye_kernels import host_copy


class Copies:
    """The pinned tensors, and of each `Tensor.to(device, ...)` the tensor, `non_blocking`, and the device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pinned: list[torch.Tensor] = []
        self.copied: list[tuple[torch.Tensor, bool]] = []
        self.devices: list[torch.device] = []
        original = torch.Tensor.to

        def empty_pinned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            self.pinned.append(torch.empty(shape, dtype=dtype))
            return self.pinned[-1]

        def to(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
            if args and isinstance(args[0], torch.device):
                self.copied.append((tensor, bool(kwargs.get("non_blocking"))))
                self.devices.append(args[0])
                return tensor.clone()
            return original(tensor, *args, **kwargs)

        monkeypatch.setattr(host_copy, "_uses_pinned_memory", lambda device: True)
        monkeypatch.setattr(host_copy, "_empty_pinned", empty_pinned)
        monkeypatch.setattr(torch.Tensor, "to", to)

    def all_asynchronous(self) -> bool:
        """Whether every copy was one of a whole pinned tensor, with `non_blocking`."""
        pinned = {id(tensor) for tensor in self.pinned}
        return bool(self.copied) and all(id(tensor) in pinned and non_blocking for tensor, non_blocking in self.copied)
