"""`warmup`: compiles the kernels that a model needs before its first request, several in parallel, and captures CUDA graphs.

It calls the model's own forward, reduced to one layer of the vision tower and one of the decoder, on tensors of the given
sizes. So it compiles exactly the kernels of a request, including the specialization on strides and alignment. A first pass
compiles in threads and launches nothing. A second pass runs the same calls with the compiled kernels.
"""

import copy
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .geometry import Grid, check_grid_thw
from .model import Keye
from .model.decoder import Decoder
from .model.graphs import CALLS_TO_CAPTURE
from .model.prompt_graphs import Bucket
from .model.vision import VisionTower
from .ops.implementation import IMPLEMENTATIONS, impl_for, resolve

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class WarmupReport:
    """Result of `warmup`.

    Attributes:
        compiled: number of kernels that were compiled.
        cached: number of kernels that were in Triton's cache.
        seconds: duration.
        note: what was warmed up, or why there was nothing to compile.
        graphs: number of CUDA graphs that the model holds.
        graph_bytes: GPU memory that they hold, with their inputs and outputs.
    """

    compiled: int
    cached: int
    seconds: float
    note: str
    graphs: int = 0
    graph_bytes: int = 0


def warmup(
    model: Keye,
    grids: Sequence[Grid | Sequence[Grid]] = (),
    prompt_lengths: Sequence[int] = (),
    *,
    pixel_dtype: str = "float32",
    progress: bool = False,
) -> WarmupReport:
    """Compiles the kernels for requests of the given sizes, in parallel, and runs each size once. Captures CUDA graphs for them.

    The compiled kernels are stored in Triton's cache on disk (TRITON_CACHE_DIR), so a second process only loads them.
    Code that `torch.compile` generates is not included.

    Args:
        model: a loaded model, on the device where it will run.
        grids: vision inputs. Each entry is the (frames, patch rows, patch columns) of one image or video, or a list of them
            for a request with several.
        prompt_lengths: numbers of prompt tokens, with placeholders expanded. One more token is decoded after each prompt.
        pixel_dtype: of the patches, "float32" or "uint8" as in `KeyeProcessor`.
        progress: show a counter of the kernels that are ready.

    Returns:
        A report. Its note says why if there is nothing to compile: no operator runs as a Triton kernel, or in the interpreter.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a grid or a prompt length is not possible for this model.
    """
    if not isinstance(model, Keye):
        raise TypeError(f"model must be a keye_kernels.Keye, got {type(model).__name__}")
    checked_grids = _check_grids(grids, model.config.vision_config.spatial_merge_size)
    lengths = _check_lengths(prompt_lengths, model.config.max_position_embeddings)
    if pixel_dtype not in ("float32", "uint8"):
        raise ValueError(f"pixel_dtype must be 'float32' or 'uint8', got {pixel_dtype!r:.100}")
    dtype = torch.uint8 if pixel_dtype == "uint8" else model.dtype
    if note := _nothing_to_compile(model):
        return WarmupReport(0, 0, 0.0, note)
    from .triton.launch import compile_steps

    steps = _steps(model, checked_grids, lengths, dtype)
    start = time.perf_counter()
    with torch.no_grad(), tqdm(desc="warm-up", unit=" kernels", disable=not progress) as bar:
        compiled, cached = compile_steps(steps, bar.update)
        for step in steps:
            step()
        if model.cuda_graphs:
            _capture_graphs(model, checked_grids, lengths, dtype)
    torch.cuda.synchronize(model.device)
    seconds, note = round(time.perf_counter() - start, 2), f"{len(steps)} sizes on {model.device}"
    held = [part.graphs.memory() for part in (model.visual, model.model)]
    return WarmupReport(compiled, cached, seconds, note, sum(m.captured for m in held), sum(m.bytes for m in held))


def _check_grids(grids: Sequence[Grid | Sequence[Grid]], merge_size: int) -> list[Tensor]:
    if not isinstance(grids, Sequence) or any(isinstance(entry, int) for entry in grids):
        raise TypeError(f"grids must be a list of (frames, patch rows, patch columns), or of lists of those, got {grids!r}")
    checked = []
    for entry in grids:
        try:
            grid = torch.tensor(entry).reshape(-1, 3)
            if not check_grid_thw(grid, None, merge_size):
                raise ValueError("the list is empty")
        except (ValueError, TypeError, RuntimeError) as error:
            expected = "(frames, patch rows, patch columns) or lists of those"
            raise ValueError(f"grids must hold {expected}, got {entry!r}: {error}") from error
        checked.append(grid)
    return checked


def _check_lengths(prompt_lengths: Sequence[int], max_tokens: int) -> list[int]:
    if not isinstance(prompt_lengths, Sequence):
        raise TypeError(f"prompt_lengths must be a list of token counts, got {prompt_lengths!r}")
    for length in prompt_lengths:
        if not isinstance(length, int) or isinstance(length, bool) or not 1 <= length < max_tokens:
            raise ValueError(f"prompt_lengths must hold token counts from 1 to {max_tokens - 1}, got {length!r}")
    return list(prompt_lengths)


def _nothing_to_compile(model: Keye) -> str | None:
    impl = model.visual.impl
    chosen = {resolve(impl_for(operator, impl), operator, model.device) for operator in IMPLEMENTATIONS}
    if "triton" not in chosen:
        return f"nothing to compile: no operator runs as a Triton kernel on {model.device}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "nothing to compile: Triton's interpreter is active (TRITON_INTERPRET=1)"
    return None


def _capture_graphs(model: Keye, grids: Sequence[Tensor], lengths: Sequence[int], dtype: torch.dtype) -> None:
    for grid_thw in grids:
        for _ in range(CALLS_TO_CAPTURE):  # in a row: with more buckets than graphs are kept, others would free its entry
            model.visual.graphs.encode(model, _blank_patches(model, grid_thw, dtype), grid_thw)
    if model.model.graphs.may_run(model.device):
        for length in [length for length in lengths if Bucket.of(1, length)] * CALLS_TO_CAPTURE:
            model(torch.zeros(1, length, dtype=torch.int64, device=model.device), logits_to_keep=1)


def _blank_patches(model: Keye, grid_thw: Tensor, dtype: torch.dtype) -> Tensor:
    shape = (int(grid_thw.prod(1).sum()), *model.config.vision_config.patch_shape)
    return torch.zeros(shape, dtype=dtype, device=model.device)


def _steps(model: Keye, grids: Sequence[Tensor], lengths: Sequence[int], dtype: torch.dtype) -> Sequence[Callable[[], object]]:
    """One call of the model's forward per size, with one layer each of tower and decoder: all layers use the same kernels."""
    reduced = _replaced(model, visual=_one_layer(model.visual), model=_one_layer(model.model))
    reduced.config = replace(model.config, num_hidden_layers=1)  # sizes the cache
    reduced.cuda_graphs = False  # graphs belong to the whole model

    def encode_image(grid_thw: Tensor) -> None:
        reduced.get_image_features(_blank_patches(model, grid_thw, dtype), grid_thw)

    def prefill_and_decode(length: int) -> None:
        ids = torch.zeros(1, length + 1, dtype=torch.int64, device=model.device)
        cache = reduced.new_cache(1, length + 1)
        reduced(ids[:, :-1], cache=cache, logits_to_keep=1)
        reduced(ids[:, -1:], cache=cache)

    return [partial(encode_image, grid) for grid in grids] + [partial(prefill_and_decode, length) for length in lengths]


def _one_layer(module: VisionTower | Decoder) -> nn.Module:
    return _replaced(module, layers=module.layers[:1])


def _replaced(module: M, **children: nn.Module) -> M:
    """A shallow copy of `module` with some children replaced. Parameters are shared."""
    copied = copy.copy(module)
    copied._modules = {**module._modules, **children}
    return copied
