"""Loading of checkpoints in the official layout: safetensors with the tensor names of the released models.

Weights are copied from memory-mapped files directly into the parameters. The parameter of a fused projection holds several
tensors of the checkpoint. The names are listed in `docs/models/keye_vl_1_5.md`, section "Checkpoint tensors".
"""

import math
import os
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from keye_kernels.ops.cpu import prefer_huge_pages

from .config import KeyeConfig, read_json, require
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
# The dtypes that are loaded, by their names in safetensors. Others have scales or a meaning that a cast would lose
STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
# Pages of a mapped file count as memory of the process until it is unmapped. After this many bytes the file is mapped again
BYTES_PER_MAPPING = 32 << 20
# With another config.json, thousands of tensors can be wrong
MAX_LISTED_TENSORS = 5


class StoredTensor(NamedTuple):
    file: Path
    shape: list[int]
    dtype: str  # as in safetensors: "BF16"


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
    """Gives a model on the meta device uninitialized parameters. Unlike `nn.Module.to_empty`, does not import torch._dynamo."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            storage = torch.empty(parameter.shape, dtype=dtype, device=device)
            prefer_huge_pages(storage)
            setattr(module, name, nn.Parameter(storage))


def matching_tensors(model: "Keye", path: Path) -> dict[str, StoredTensor]:
    """The tensors in the folder `path` that `model` needs. The model may be on the meta device.

    Raises FileNotFoundError if a file is missing, and ValueError if a file is damaged or tensors are missing, unexpected or have
    the wrong shape or dtype. The message lists the first
    of each kind.
    """
    found = stored_tensors(path)
    if wrong := compare_tensors(model, found):
        listed = "\n  ".join(first_of_each_kind(wrong))
        raise ValueError(f"path must hold the tensors that its config.json describes, got {path} with\n  {listed}")
    return {name: found[name] for name in found if not is_unused(name, model.config)}


def compare_tensors(model: "Keye", found: dict[str, StoredTensor]) -> list[str]:
    """One line per tensor that is missing, unexpected or has the wrong shape or dtype."""
    views = destinations(model)
    wrong = [f"missing: {name}" for name in views.keys() - found.keys()]
    for name, tensor in found.items():
        if is_unused(name, model.config):
            continue
        if name not in views:
            wrong.append(f"unexpected: {name}")
        elif tensor.shape != (shape := list(views[name].shape)):
            wrong.append(f"wrong shape: {name} is {tensor.shape}, expected {shape}")
        if name in views and tensor.dtype not in STORED_DTYPES:
            wrong.append(f"wrong dtype: {name} is {tensor.dtype}, expected one of {', '.join(STORED_DTYPES)}")
    return wrong


def is_unused(name: str, config: KeyeConfig) -> bool:
    """Whether the model has no parameter for this tensor of a checkpoint, which is not an error."""
    return name.startswith((*UNUSED, "lm_head.") if config.tie_word_embeddings else UNUSED)


def first_of_each_kind(problems: list[str]) -> Iterator[str]:
    """The first lines of each kind of problem, such as "missing: NAME", and how many more there are."""
    for kind, group in groupby(sorted(problems), key=lambda line: line.partition(":")[0]):
        lines = list(group)
        yield from (line[:200] for line in lines[:MAX_LISTED_TENSORS])
        if len(lines) > MAX_LISTED_TENSORS:
            yield f"{kind}: {len(lines) - MAX_LISTED_TENSORS} more"


def load_weights(model: "Keye", stored: dict[str, StoredTensor], *, progress: bool = False) -> None:
    """Copies the tensors that `matching_tensors` found into the parameters of `model`."""
    views = destinations(model)
    total = sum(view.nbytes for view in views.values())
    with tqdm(total=total, desc="Loading weights", unit="B", unit_scale=True, disable=not progress) as bar:
        # In the order of the files, so that each file is read sequentially
        for name, first, chunk in _read_chunks((name, tensor.file) for name, tensor in stored.items()):
            target = views[name][first : first + len(chunk)]
            target.copy_(chunk)
            bar.update(target.nbytes)


def _indexed_files(index: Path) -> list[Path]:
    """The files that model.safetensors.index.json names. They must be in its folder."""
    weight_map: Any = read_json(index).get("weight_map")
    require(isinstance(weight_map, dict), f"{index}: weight_map", "a JSON object", weight_map)
    for tensor, file in weight_map.items():
        # The name in a Windows path is the part after the last / or \, without a drive
        if not isinstance(file, str) or file in ("", "..") or PureWindowsPath(file).name != file:
            raise ValueError(f"{index}: weight_map must name files in its own folder, got {file!r:.100} for {tensor}")
    return sorted({index.parent / file for file in weight_map.values()})


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor in a checkpoint, from the headers of its files."""
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if index.is_file():
        files = _indexed_files(index)
    elif single.is_file():
        files = [single]
    elif any(path.glob("*.bin")) or any(path.glob("*.pt")):
        raise ValueError(f"path must hold safetensors, got {path} with pickled weights, which can run code; convert them first")
    else:
        raise FileNotFoundError(f"path must hold model.safetensors or model.safetensors.index.json, got {path}")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        if not os.path.isfile(file):  # unlike Path.is_file, also False for a name that is too long
            raise FileNotFoundError(f"{index} names {file.name}, which is missing; download the checkpoint again")
        try:
            with safe_open(file, "pt") as handle:
                slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
                tensors |= {name: StoredTensor(file, x.get_shape(), x.get_dtype()) for name, x in slices.items()}
        except SafetensorError as error:
            raise ValueError(f"{file} is not a complete safetensors file ({str(error)[:200]}); download it again") from error
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
