"""Loading of checkpoints in the official layout: safetensors with the tensor names of the released models.

Weights are copied from memory-mapped files directly into the parameters. The parameter of a fused projection holds several
tensors of the checkpoint. The names are listed in `docs/models/keye_vl_1_5.md`, section "Checkpoint tensors".
"""

import ctypes
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from .linear import FusedLinear

if TYPE_CHECKING:
    from .keye import Keye

# Prefix of the parameter -> prefix in the checkpoint. All other names are the same.
RENAMED = {
    "visual.patch_embedding.": "visual.vision_model.embeddings.patch_embedding.",
    "visual.position_embedding.": "visual.vision_model.embeddings.position_embedding.",
    "visual.layers.": "visual.vision_model.encoder.layers.",
    "visual.post_layernorm.": "visual.vision_model.post_layernorm.",
}
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# Present in released checkpoints, not used for inference
UNUSED = ("visual.vision_model.head.", "visual.vision_model.embeddings.packing_position_embedding.")
# Pages of a mapped file count as memory of the process until it is unmapped. After this many bytes the file is mapped again
BYTES_PER_MAPPING = 32 << 20
HUGE_PAGE_BYTES = 2 << 20
MADV_HUGEPAGE = 14  # the value on Linux for every architecture that torch supports


def destinations(model: "Keye") -> dict[str, Tensor]:
    """Maps every tensor name of the official checkpoint to a view of the parameter that stores it, in the official shape."""
    views = {}
    for name, parameter in model.named_parameters():
        prefix = next((prefix for prefix in RENAMED if name.startswith(prefix)), "")
        official = RENAMED.get(prefix, "") + name.removeprefix(prefix)
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, FusedLinear):
            fused = next(fused for fused in FUSED if f".{fused}." in name)
            for part, view in zip(FUSED[fused], parameter.data.split(module.sizes), strict=True):
                views[official.replace(fused, part)] = view
        elif name == "visual.patch_embedding.weight":
            views[official] = parameter.data.unflatten(1, model.config.vision_config.patch_shape)
        else:
            views[official] = parameter.data
    return views


def allocate(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Gives a model on the meta device uninitialised parameters. Unlike `nn.Module.to_empty`, does not import torch._dynamo."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            storage = torch.empty(parameter.shape, dtype=dtype, device=device)
            prefer_huge_pages(storage)
            setattr(module, name, nn.Parameter(storage))


def prefer_huge_pages(x: Tensor) -> None:
    """Asks Linux for 2 MB pages for an uninitialised CPU tensor: the first write is three times as fast. This is only a hint."""
    start = -(-x.data_ptr() // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    length = (x.data_ptr() + x.nbytes - start) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if sys.platform == "linux" and x.device.type == "cpu" and length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), MADV_HUGEPAGE)


def load_weights(model: "Keye", path: Path, *, progress: bool = False) -> None:
    """Copies the safetensors in the folder `path` into the parameters of `model`.

    Before anything is copied, raises FileNotFoundError if a file is missing, and ValueError if a file is damaged or tensors are
    missing, unexpected or have the wrong shape. The message lists all of them.
    """
    views, found = destinations(model), _stored_tensors(path)
    accepted = (*UNUSED, "lm_head.") if model.config.tie_word_embeddings else UNUSED
    wrong = [f"missing: {name}" for name in views.keys() - found.keys()]
    wrong += [f"unexpected: {name}" for name in found.keys() - views.keys() if not name.startswith(accepted)]
    shapes = [(name, found[name][1], list(views[name].shape)) for name in views.keys() & found.keys()]
    wrong += [f"wrong shape: {name} is {stored}, expected {shape}" for name, stored, shape in shapes if stored != shape]
    if wrong:
        listed = "\n  ".join(sorted(wrong))
        raise ValueError(f"path must hold the tensors that its config.json describes, got {path} with\n  {listed}")
    total = sum(view.nbytes for view in views.values())
    with tqdm(total=total, desc="Loading weights", unit="B", unit_scale=True, disable=not progress) as bar:
        # In the order of the files, so that each file is read sequentially
        for name, first, chunk in _read_chunks((name, file) for name, (file, _) in found.items() if name in views):
            target = views[name][first : first + len(chunk)]
            target.copy_(chunk)
            bar.update(target.nbytes)


def stored_dtype(path: Path) -> torch.dtype:
    """The dtype of the token embeddings in the checkpoint."""
    file, _ = _stored_tensors(path)["model.embed_tokens.weight"]
    with safe_open(file, "pt") as handle:
        return handle.get_slice("model.embed_tokens.weight")[:1].dtype


def read_optional_json(file: Path) -> dict:
    """The content of a JSON file, or {} if there is no such file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _stored_tensors(path: Path) -> dict[str, tuple[Path, list[int]]]:
    """File and shape of every tensor in a checkpoint."""
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({path / file for file in names.values()})
    elif single.is_file():
        files = [single]
    elif any(path.glob("*.bin")) or any(path.glob("*.pt")):
        raise ValueError(f"path must hold safetensors, got {path} with pickled weights, which can run code; convert them first")
    else:
        raise FileNotFoundError(f"path must hold model.safetensors or model.safetensors.index.json, got {path}")
    tensors: dict[str, tuple[Path, list[int]]] = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{index} names {file.name}, which is missing; download the checkpoint again")
        try:
            with safe_open(file, "pt") as handle:
                tensors |= {name: (file, handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file} is not a complete safetensors file ({error}); download it again") from error
    return tensors


def _read_chunks(tensors: Iterable[tuple[str, Path]]) -> Iterator[tuple[str, int, Tensor]]:
    """Yields each tensor in chunks of rows: name, index of the first row, rows. A chunk is valid until the next is requested."""
    handle: Any = None
    opened, mapped_bytes = None, 0
    for name, file in tensors:
        first, rows = 0, 1
        while first < rows:
            if file != opened or mapped_bytes >= BYTES_PER_MAPPING:
                handle, opened, mapped_bytes = safe_open(file, "pt"), file, 0
            whole = handle.get_slice(name)
            rows, *rest = whole.get_shape()
            count = max(1, BYTES_PER_MAPPING // (4 * math.prod(rest)))
            chunk = whole[first : first + count]
            mapped_bytes += chunk.nbytes
            yield name, first, chunk
            # The mapping stays open while a view of it exists
            del chunk, whole
            first += count
