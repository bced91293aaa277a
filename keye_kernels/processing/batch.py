"""The dictionary of tensors that the processor returns, and the padding of its token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from keye_kernels.host_copy import copy_to_device

# Sizes and times, which the model reads on the CPU: on a GPU, each request would wait for them
CPU_INPUTS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "num_frames")


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
        """Moves the tensors to a device and casts the floating-point ones, in place. Returns this object.

        None leaves the device or the dtype as it is. As in transformers, `device` may also be a dtype. Unlike there, sizes and
        times (`image_grid_thw`, `video_grid_thw`, `second_per_grid_ts`, `num_frames`) stay on the CPU, where the model reads
        them. Copies to a GPU are asynchronous, through pinned memory of their own. `non_blocking` is for other copies.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        target = None if device is None else torch.device(device)
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                target_dtype = dtype if value.is_floating_point() else None
                if target is None or (name in CPU_INPUTS and target.type != "cpu"):
                    self[name] = value.to(target_dtype) if target_dtype else value
                else:
                    self[name] = copy_to_device(value, target, target_dtype, non_blocking)
        return self


def check_padding(padding: bool | str, padding_side: str) -> None:
    """Raises ValueError for an unknown value of `padding` or `padding_side`."""
    if padding not in (True, False, "longest"):
        raise ValueError(f"padding must be True, 'longest' or False, got {padding!r}")
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")


def pad_sequences(
    sequences: Sequence[Sequence[int]], pad_token_id: int | None, *, padding: bool | str, padding_side: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads B sequences of token ids to the longest one; returns `(input_ids, attention_mask)`, int64 `[B, S]`.

    Raises ValueError for different lengths if `padding` is False or there is no `pad_token_id`.
    """
    lengths = [len(ids) for ids in sequences]
    if len(set(lengths)) > 1:
        if not padding:
            raise ValueError(f"padding=False needs prompts of equal length, got {lengths} tokens; use padding=True")
        if pad_token_id is None:
            raise ValueError("padding needs pad_token or eos_token in tokenizer_config.json, and there is neither")
    input_ids = torch.full((len(sequences), max(lengths)), pad_token_id or 0, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for index, ids in enumerate(sequences):
        slots = slice(-len(ids), None) if padding_side == "left" else slice(len(ids))
        input_ids[index, slots] = torch.tensor(ids)
        attention_mask[index, slots] = 1
    return input_ids, attention_mask
