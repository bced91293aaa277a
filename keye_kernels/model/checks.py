"""Checks of the arguments of `Keye`'s public methods. Symbols: B sequences, S tokens per sequence."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import WEIGHT_DTYPES


def check_device(device: torch.device | str) -> torch.device:
    """Returns `device` as a torch.device. Raises ValueError if it is not one or is not available."""
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be a torch device such as 'cpu' or 'cuda:0', got {device!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be available, got {str(device)!r}, but torch finds no CUDA or ROCm GPU; use 'cpu'")
    try:
        torch.empty(0, device=device).cpu()
    except (RuntimeError, ImportError, AssertionError) as error:
        raise ValueError(f"device must be available, got {str(device)!r}, which torch cannot use") from error
    return device


def check_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Returns `dtype` as a torch.dtype. Raises TypeError if it is not one of WEIGHT_DTYPES."""
    name = str(dtype).removeprefix("torch.")
    if name not in WEIGHT_DTYPES:
        raise TypeError(f"dtype must be a floating-point torch dtype, one of {', '.join(WEIGHT_DTYPES)}, got {dtype!r}")
    return getattr(torch, name)


def check_given_together(name: str, value: Any, other_name: str, other_value: Any) -> None:
    """Raises ValueError if only one of two optional arguments is given."""
    if (value is None) != (other_value is None):
        raise ValueError(f"{name} and {other_name} must be given together, got only {other_name if value is None else name}")


def check_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Returns the mask [B, S] of `input_ids` [B, S]: the last S columns of `attention_mask` [B, at least S], or ones.

    Raises ValueError if S is 0, the shapes do not match, or there is padding between the tokens of a sequence.
    """
    batch_size, length = input_ids.shape
    if length == 0:
        raise ValueError("input_ids must hold at least one token, got an empty prompt")
    if attention_mask is None:
        return torch.ones_like(input_ids)
    if attention_mask.shape[0] != batch_size or attention_mask.shape[1] < length:
        raise ValueError(f"attention_mask must have shape {[batch_size, length]}, got {list(attention_mask.shape)}")
    mask = attention_mask[:, -length:]
    if not torch.compiler.is_compiling() and has_inner_padding(mask).any():
        raise ValueError("attention_mask must be 0 only at the ends of a sequence, got padding between its tokens")
    return mask


def has_inner_padding(attention_mask: Tensor) -> Tensor:
    """[B] bool: which sequences of `attention_mask` [B, S] have padding between their tokens."""
    starts = F.pad(attention_mask.bool().int(), (1, 0)).diff(dim=1) > 0
    return starts.sum(1) > 1


def check_generation(input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int, max_position_embeddings: int) -> None:
    """Raises ValueError if the tokens do not fit in the model's context or a prompt is padded on the right."""
    length = input_ids.shape[1]
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if length + max_new_tokens > max_position_embeddings:
        needed = f"{length} prompt tokens and {max_new_tokens} new tokens"
        raise ValueError(f"max_new_tokens: {needed} exceed the model's {max_position_embeddings} positions; reduce one of them")
    if attention_mask is not None and not attention_mask[:, -1].all():
        raise ValueError("attention_mask must pad on the left for generation, got a sequence padded on the right")
