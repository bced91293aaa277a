"""Checks of the arguments of `Keye`'s public methods. Symbols: B sequences, S tokens per sequence."""

from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from keye_kernels.ops.checks import FLOATS, INTEGERS, check_tensor

from .cache import KVCache
from .config import WEIGHT_DTYPES

MASK_DTYPES = (*INTEGERS, torch.bool, torch.uint8, torch.int8, torch.int16, *FLOATS)


def choose_dtype(dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None, default: Any) -> torch.dtype:
    """`dtype`, or `torch_dtype`, its older name in transformers. None and "auto" choose `default`."""
    given = {check_dtype(name) for name in (dtype, torch_dtype) if name not in (None, "auto")}
    if len(given) == 2:
        raise ValueError(f"dtype and torch_dtype must be the same, got {dtype!r} and {torch_dtype!r}")
    return given.pop() if given else check_dtype(default)


def choose_device(device: torch.device | str | None, device_map: Any) -> torch.device:
    """`device`, or the one device of `device_map`, transformers' name: "auto" is a GPU if there is one, else the CPU."""
    if device_map is None:
        return check_device(torch.get_default_device() if device is None else device)
    if device is not None:
        raise ValueError(f"device and device_map must not both be given, got {device!r} and {device_map!r}")
    if not isinstance(device_map, (str, int, torch.device)) or device_map in ("balanced", "balanced_low_0", "sequential"):
        raise ValueError(
            f"device_map must be 'auto' or one device such as 'cuda:0', got {device_map!r:.100}; to split a model over devices, "
            "use the transformers model of keye_kernels.auto"
        )
    return check_device(("cuda" if torch.cuda.is_available() else "cpu") if device_map == "auto" else device_map)


def check_device(device: torch.device | str | int) -> torch.device:
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

    Raises TypeError for other types, and ValueError if S is 0, the shapes do not match, or there is padding between the tokens of
    a sequence.
    """
    check_prompt(input_ids, attention_mask)
    batch_size, length = input_ids.shape
    if attention_mask is None:
        return torch.ones_like(input_ids)
    if attention_mask.shape[0] != batch_size or attention_mask.shape[1] < length:
        raise ValueError(f"attention_mask must have shape {[batch_size, length]}, got {list(attention_mask.shape)}")
    mask = attention_mask[:, -length:]
    if not torch.compiler.is_compiling() and has_inner_padding(mask).any():
        raise ValueError("attention_mask must be 0 only at the ends of a sequence, got padding between its tokens")
    return mask


def check_prompt(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Raises TypeError or ValueError unless these are dense tensors [B, S] with values and a suitable dtype, and not empty."""
    check_tensor("input_ids", input_ids, ("B", "S"), INTEGERS, input_ids)
    if 0 in input_ids.shape:
        raise ValueError(f"input_ids must hold at least one token, got an empty prompt of shape {list(input_ids.shape)}")
    if input_ids.is_meta:
        raise ValueError("input_ids must have values, got a tensor on the meta device")
    if attention_mask is not None:
        check_tensor("attention_mask", attention_mask, ("B", "S"), MASK_DTYPES, input_ids)


def check_token_range(input_ids: Tensor, vocab_size: int) -> None:
    """Raises ValueError for ids outside of the vocabulary. Reads values, so on a GPU it synchronizes."""
    low, high = (int(value) for value in input_ids.cpu().aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"input_ids must be from 0 to {vocab_size - 1}, got {low if low < 0 else high}")


def check_patches(pixel_values: Tensor, patch_shape: tuple[int, ...]) -> None:
    """Raises TypeError or ValueError unless `pixel_values` are patches [T, *patch_shape], floating-point or uint8."""
    if not isinstance(pixel_values, Tensor) or pixel_values.layout is not torch.strided or pixel_values.is_meta:
        kind = (
            f"{pixel_values.layout} on {pixel_values.device}" if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
        )
        raise TypeError(f"pixel_values must be a dense tensor with values, got {kind}")
    if not pixel_values.is_floating_point() and pixel_values.dtype != torch.uint8:
        raise TypeError(f"pixel_values must be normalized floats or uint8, got {pixel_values.dtype}")
    if pixel_values.ndim != 4 or pixel_values.shape[1:] != patch_shape:
        raise ValueError(f"pixel_values must have shape {['T', *patch_shape]}, got {list(pixel_values.shape)}")


def to_seconds(second_per_grid_ts: Any) -> Tensor | None:
    """`second_per_grid_ts` as a tensor. Raises ValueError if it does not hold real numbers."""
    try:
        seconds = None if second_per_grid_ts is None else torch.as_tensor(second_per_grid_ts)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        seconds = torch.tensor(1j)
    if seconds is not None and (seconds.is_complex() or seconds.layout is not torch.strided or seconds.is_meta):
        raise ValueError(f"second_per_grid_ts must be one number per video, got {second_per_grid_ts!r:.100}")
    return None if seconds is None else seconds.float()


def check_cache(cache: Any) -> None:
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache must be a KVCache of model.new_cache, got {type(cache).__name__}")


def has_inner_padding(attention_mask: Tensor) -> Tensor:
    """[B] bool: which sequences of `attention_mask` [B, S] have padding between their tokens."""
    starts = F.pad(attention_mask.bool().int(), (1, 0)).diff(dim=1) > 0
    return starts.sum(1) > 1


def check_generation(input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int, max_position_embeddings: int) -> None:
    """Raises ValueError or TypeError unless the tokens fit in the model's context and prompts are padded on the left."""
    check_tokens(input_ids, attention_mask)
    length = input_ids.shape[1]
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, Integral):
        raise TypeError(f"max_new_tokens must be an integer, got {max_new_tokens!r:.100}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if length + max_new_tokens > max_position_embeddings:
        needed = f"{length} prompt tokens and {max_new_tokens} new tokens"
        raise ValueError(f"max_new_tokens: {needed} exceed the model's {max_position_embeddings} positions; reduce one of them")
    if attention_mask is not None and not attention_mask[:, -1].all():
        raise ValueError("attention_mask must pad on the left for generation, got a sequence padded on the right")
