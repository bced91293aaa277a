"""`warmup`: compiles the kernels that a model will need before its first request, several at a time.

The model's own forward runs, with one layer of tower and decoder, on tensors of the given sizes: what is compiled is what a
request will call for, strides and alignment included. A first pass compiles in threads and launches nothing; a second one
runs the same calls, which now find every kernel in Triton's cache.
"""

import copy
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .geometry import check_grid_thw
from .model import Keye
from .ops.implementation import resolve

Grid = tuple[int, int, int]
OPERATORS = ("rope", "varlen_attention", "patch_merge_projection", "position_embedding_2d")


@dataclass(frozen=True)
class WarmupReport:
    """What a warm-up did. `compiled` counts kernels that were not in Triton's cache, `cached` those that were."""

    compiled: int
    cached: int
    seconds: float
    note: str


def warmup(
    model: Keye,
    grids: Sequence[Grid | Sequence[Grid]] = (),
    prompt_lengths: Sequence[int] = (),
    *,
    progress: bool = False,
) -> WarmupReport:
    """Compiles, in parallel, what requests of these sizes need, and runs each size once.

    Args:
        model: a loaded `kk.Keye`, where it will serve.
        grids: a request's picture as (frames, patch rows, patch columns), or a list of such where it has several.
        prompt_lengths: tokens of a prompt, placeholders expanded; one further token is decoded after each.
        progress: count the kernels that are ready.

    Returns: a `WarmupReport`. Where nothing is compiled (the reference implementation, Triton's interpreter), it says so.
    Raises: ValueError or TypeError naming the argument. A second process finds the kernels in Triton's cache on disk
        (TRITON_CACHE_DIR) and only loads them. What `torch.compile` would compile is not part of this.
    """
    if not isinstance(model, Keye):
        raise TypeError(f"model must be a keye_kernels.Keye, got {type(model).__name__}")
    pictures = _check_grids(grids, model.config.vision_config.spatial_merge_size)
    lengths = _check_lengths(prompt_lengths, model.config.max_position_embeddings)
    if note := _nothing_to_compile(model):
        return WarmupReport(0, 0, 0.0, note)
    from .triton.launch import compile_steps

    steps = _steps(model, pictures, lengths)
    start = time.perf_counter()
    with torch.no_grad(), tqdm(desc="warm-up", unit=" kernels", disable=not progress) as bar:
        compiled, cached = compile_steps(steps, bar.update)
        for step in steps:
            step()
    torch.cuda.synchronize(model.device)
    seconds = round(time.perf_counter() - start, 2)
    return WarmupReport(compiled, cached, seconds, f"{len(steps)} sizes on {model.device}")


def _check_grids(grids: Sequence[Grid | Sequence[Grid]], merge_size: int) -> list[Tensor]:
    if not isinstance(grids, Sequence) or any(isinstance(entry, int) for entry in grids):
        raise TypeError(
            f"grids must be a list of (frames, patch rows, patch columns), or of lists of those, got {grids!r}"
        )
    checked = []
    for entry in grids:
        try:
            grid = torch.tensor(entry).reshape(-1, 3)
            if not check_grid_thw(grid, None, merge_size):
                raise ValueError("no picture")
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"grids must hold (frames, patch rows, patch columns) or lists of those, got {entry!r}: {error}"
            ) from error
        checked.append(grid)
    return checked


def _check_lengths(prompt_lengths: Sequence[int], most: int) -> list[int]:
    if not isinstance(prompt_lengths, Sequence):
        raise TypeError(f"prompt_lengths must be a list of numbers of tokens, got {prompt_lengths!r}")
    for length in prompt_lengths:
        if not isinstance(length, int) or isinstance(length, bool) or not 1 <= length < most:
            raise ValueError(f"prompt_lengths must hold numbers of tokens from 1 to {most - 1}, got {length!r}")
    return list(prompt_lengths)


def _nothing_to_compile(model: Keye) -> str | None:
    chosen = {resolve(model.mlp_AR.impl, operator, model.device) for operator in OPERATORS}
    if "triton" not in chosen:
        return f"nothing to compile: the reference implementation serves {model.device}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "nothing to compile: TRITON_INTERPRET=1 makes Triton interpret its kernels"
    return None


def _steps(model: Keye, pictures: Sequence[Tensor], lengths: Sequence[int]) -> list[Callable[[], object]]:
    """For each size a call of the model's own forward, with one layer each of tower and decoder: all are alike."""
    thin = _replaced(model, visual=_one_layer(model.visual), model=_one_layer(model.model))
    thin.config = replace(model.config, num_hidden_layers=1)  # of which the cache is made
    vision = model.config.vision_config
    patch = (vision.num_channels, vision.patch_size, vision.patch_size)

    def look(grid: Tensor) -> None:
        patches = int(grid.prod(1).sum())
        thin.get_image_features(torch.zeros(patches, *patch, dtype=model.dtype, device=model.device), grid)

    def read(length: int) -> None:
        ids = torch.zeros(1, length + 1, dtype=torch.int64, device=model.device)
        cache = thin.new_cache(1, length + 1)
        thin(ids[:, :-1], cache=cache, logits_to_keep=1)
        thin(ids[:, -1:], cache=cache)

    return [*(partial(look, grid) for grid in pictures), *(partial(read, length) for length in lengths)]


def _one_layer(module: nn.Module) -> nn.Module:
    return _replaced(module, layers=module.layers[:1])


def _replaced(module: nn.Module, **children: nn.Module) -> nn.Module:
    """A shallow copy with other children; the parameters are shared."""
    shallow = copy.copy(module)
    shallow._modules = {**module._modules, **children}
    return shallow
