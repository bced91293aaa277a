"""Checkpoints in the official layout: safetensors with Keye's tensor names, copied straight into the model's (fused) tensors."""

import ctypes
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from .linear import FusedLinear

# Ours -> the checkpoint's. Everything else has the checkpoint's name already.
RENAMED = {
    "visual.patch_embedding.": "visual.vision_model.embeddings.patch_embedding.",
    "visual.position_embedding.": "visual.vision_model.embeddings.position_embedding.",
    "visual.layers.": "visual.vision_model.encoder.layers.",
    "visual.post_layernorm.": "visual.vision_model.post_layernorm.",
}
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# In released checkpoints, but no part of inference
UNUSED = ("visual.vision_model.head.", "visual.vision_model.embeddings.packing_position_embedding.")
# A mapped file's pages count as memory of the process until it is unmapped, so it is mapped anew after each so many bytes
BYTES_PER_MAPPING = 32 << 20
HUGE_PAGE = 2 << 20
MADV_HUGEPAGE = 14  # of Linux, on every architecture that torch runs on


def destinations(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by its official name, as a view (of the official shape) of the parameter it belongs in."""
    views = {}
    for name, parameter in model.named_parameters():
        prefix = next((ours for ours in RENAMED if name.startswith(ours)), None)
        official = name if prefix is None else RENAMED[prefix] + name.removeprefix(prefix)
        module = model.get_submodule(name.rpartition(".")[0])
        fused = next((ours for ours in FUSED if f".{ours}." in name), None)
        if isinstance(module, FusedLinear):
            for part, view in zip(FUSED[fused], parameter.data.split(module.sizes), strict=True):
                views[official.replace(fused, part)] = view
        elif name == "visual.patch_embedding.weight":
            vision = model.config.vision_config
            shape = (vision.num_channels, vision.patch_size, vision.patch_size)
            views[official] = parameter.data.unflatten(1, shape)
        else:
            views[official] = parameter.data
    return views


def allocate(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Gives a model on the meta device its memory, not yet filled (`to_empty` imports torch's whole tracer on the way)."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            memory = torch.empty(parameter.shape, dtype=dtype, device=device)
            prefer_huge_pages(memory)
            setattr(module, name, nn.Parameter(memory))


def prefer_huge_pages(x: Tensor) -> None:
    """Asks Linux for pages of 2 MB under a CPU tensor not yet written to: the kernel then fills it three times as fast.

    Only a hint; where the system knows no such pages, or keeps them to itself, nothing changes.
    """
    start = -(-x.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    length = (x.data_ptr() + x.nbytes - start) // HUGE_PAGE * HUGE_PAGE
    if sys.platform == "linux" and x.device.type == "cpu" and length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), MADV_HUGEPAGE)


def load_weights(model: nn.Module, path: Path, *, progress: bool = False) -> None:
    """Fills `model` from the safetensors in the folder `path`.

    Raises one ValueError that lists every missing, unexpected and wrongly shaped tensor, before anything is copied.
    """
    views, found = destinations(model), _tensors(path)
    accepted = (*UNUSED, "lm_head.") if model.config.tie_word_embeddings else UNUSED
    wrong = [f"missing: {name}" for name in views.keys() - found.keys()]
    wrong += [f"unexpected: {name}" for name in found.keys() - views.keys() if not name.startswith(accepted)]
    wrong += [
        f"wrong shape: {name} is {found[name][1]}, expected {list(views[name].shape)}"
        for name in views.keys() & found.keys()
        if found[name][1] != list(views[name].shape)
    ]
    if wrong:
        raise ValueError(
            f"path {path} does not hold the tensors that its config.json asks for:\n  " + "\n  ".join(sorted(wrong))
        )
    total = sum(view.nbytes for view in views.values())
    # In the order of the files, so that each is read once from front to back
    order = [name for name in found if name in views]
    with tqdm(total=total, desc="Loading weights", unit="B", unit_scale=True, disable=not progress) as bar:
        for name, first, piece in _pieces((name, found[name][0]) for name in order):
            target = views[name][first : first + len(piece)]
            target.copy_(piece)
            bar.update(target.nbytes)


def stored_dtype(path: Path) -> torch.dtype:
    """The dtype in which the checkpoint in `path` stores its token embeddings."""
    file, _ = _tensors(path)["model.embed_tokens.weight"]
    with safe_open(file, "pt") as handle:
        return handle.get_slice("model.embed_tokens.weight")[:1].dtype


def _tensors(path: Path) -> dict[str, tuple[Path, list[int]]]:
    """File and shape of every tensor of a checkpoint."""
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({path / file for file in names.values()})
    elif single.is_file():
        files = [single]
    elif any(path.glob("*.bin")) or any(path.glob("*.pt")):
        raise ValueError(
            f"path {path} holds pickled weights, which can run code and are refused; convert them to safetensors"
        )
    else:
        raise FileNotFoundError(f"path {path} has neither model.safetensors nor model.safetensors.index.json")
    tensors = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{index} names {file.name}, which is missing: download the checkpoint again")
        try:
            with safe_open(file, "pt") as handle:
                names = handle.keys()
                tensors |= {name: (file, handle.get_slice(name).get_shape()) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{file} is not a complete safetensors file ({error}): download it again") from error
    return tensors


def _pieces(tensors: Iterable[tuple[str, Path]]) -> Iterator[tuple[str, int, Tensor]]:
    """The rows of each tensor in pieces: name, first row, rows. A piece lives in the mapped file until the next is taken."""
    handle, opened, mapped = None, None, 0
    for name, file in tensors:
        first, rows = 0, 1
        while first < rows:
            if file != opened or mapped >= BYTES_PER_MAPPING:
                handle, opened, mapped = safe_open(file, "pt"), file, 0
            whole = handle.get_slice(name)
            rows, *rest = whole.get_shape()
            count = max(1, BYTES_PER_MAPPING // (4 * math.prod(rest)))
            piece = whole[first : first + count]
            mapped += piece.nbytes
            yield name, first, piece
            del piece, whole
            first += count
