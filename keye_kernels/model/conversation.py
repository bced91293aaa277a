"""Which tokens of a conversation a cache already holds, so that `Keye.generate` processes only those that are new.

Tokens agree if their ids and their mask do and, for placeholders, grid, time and pixels of the image or video as well. The
columns that all sequences of a batch have in common with the cache are kept; the rest is dropped from the cache.
Symbols: B sequences, S tokens per sequence.
"""

from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor

from keye_kernels.geometry import check_grid_thw

from . import checks
from .cache import KVCache
from .config import KeyeConfig
from .positions import check_seconds, rope_index

if TYPE_CHECKING:
    from .keye import Keye

MEDIA = (("image", "pixel_values", "image_grid_thw"), ("video", "pixel_values_videos", "video_grid_thw"))


@dataclass(frozen=True)
class Block:
    """One image or video of a conversation (1.5: one run of frames), from `start` to before `end` in its sequence."""

    kind: str
    sequence: int
    start: int  # of the token before the placeholders: Preview needs it in the same call
    end: int
    grid: tuple[int, int, int]
    seconds: float | None
    pixels: bytes  # their SHA-256


@dataclass
class Conversation:
    """What the first slots of a cache hold.

    Attributes:
        model: whose keys and values these are.
        ids: [B, S] on the CPU.
        mask: [B, S] bool on the CPU, False for padding.
        blocks: the images and videos.
    """

    model: Any
    ids: Tensor
    mask: Tensor
    blocks: list[Block]

    def extend(self, tokens: Tensor) -> None:
        """Adds generated tokens [B, n]."""
        tokens = tokens.to(self.ids)
        self.ids = torch.cat((self.ids, tokens), dim=1)
        self.mask = torch.cat((self.mask, torch.ones_like(tokens, dtype=torch.bool)), dim=1)

    def first(self, columns: int) -> "Conversation":
        """The first columns; no block may be cut."""
        blocks = [block for block in self.blocks if block.end <= columns]
        return Conversation(self.model, self.ids[:, :columns], self.mask[:, :columns], blocks)

    def rope_deltas(self, config: KeyeConfig) -> Tensor:
        """[B, 1], as `KVCache.rope_deltas` after these tokens."""
        if not self.blocks:
            return self.mask.sum(1, keepdim=True) - self.ids.shape[1]
        images, videos = (_grids([block for block in self.blocks if block.kind == kind]) for kind, *_ in MEDIA)
        seconds = torch.tensor([block.seconds for block in self.blocks if block.kind == "video"], device="cpu")
        return rope_index(config, self.ids, images, videos, seconds, self.mask)[1]


def resume(model: "Keye", cache: KVCache, inputs: dict[str, Any]) -> tuple[Conversation, dict[str, Any]]:
    """Drops from `cache` what differs from `inputs`, the arguments of `forward` for a whole conversation.

    Returns the conversation, and the arguments for its tokens that are not in the cache: always at least one column.
    """
    _check(model, cache, inputs)
    ids, given_mask = inputs["input_ids"].cpu(), inputs["attention_mask"]
    mask = torch.ones_like(ids, dtype=torch.bool) if given_mask is None else given_mask.cpu() != 0
    known = cache.conversation or Conversation(ref(model), ids[:, :0], mask[:, :0], [])
    kept = _common_columns(known, ids, mask)
    pixels: dict[Block, Tensor] = {}  # of those that are in `inputs`
    blocks = [block for names in MEDIA for block in _blocks(model.config, names, ids, mask, inputs, known.blocks, kept, pixels)]
    blocks.sort(key=lambda block: (block.sequence, block.start))
    conversation = Conversation(ref(model), ids, mask, blocks)
    kept = _end_of_whole_blocks(kept, blocks, set(known.blocks))
    new = {name: value for name, value in inputs.items() if name not in ("num_frames", "second_per_grid_ts")}
    new["input_ids"] = inputs["input_ids"][:, kept:]
    new["attention_mask"] = None if given_mask is None else given_mask[:, kept:]
    for kind, pixels_name, grids_name in MEDIA:
        later = [block for block in blocks if block.kind == kind and block.end > kept]
        if missing := [block for block in later if block not in pixels]:
            where = f"of the tokens from {kept} on, which are not in the cache"
            raise ValueError(f"{pixels_name} must have the {kind}s {where}, got none for {len(missing)} of {len(later)}")
        if not later:
            new[pixels_name] = new[grids_name] = None
        elif len(later) < len(inputs[grids_name]):
            new[pixels_name], new[grids_name] = torch.cat([pixels[block] for block in later]), _grids(later)
        if later and kind == "video":
            new["second_per_grid_ts"] = torch.tensor([block.seconds for block in later], device="cpu")
    cache.keep_first(kept)
    cache.conversation = conversation.first(kept)
    cache.rope_deltas = cache.conversation.rope_deltas(model.config).to(cache.rope_deltas)
    return conversation, new


def _check(model: "Keye", cache: KVCache, inputs: dict[str, Any]) -> None:
    cache.reserve(len(inputs["input_ids"]), 0)
    key, config = cache.keys[0], model.config
    found = len(cache.keys), *key.shape[2:], key.dtype, key.device
    expected = config.num_hidden_layers, config.num_key_value_heads, config.head_dim, model.dtype, model.device
    if found != expected:
        names = "layers, heads, head dim, dtype and device"
        raise ValueError(f"cache must have the {names} of the model, {[*map(str, expected)]}, got {[*map(str, found)]}")
    if cache.conversation is not None and cache.conversation.model() is not model:
        raise ValueError("cache must be empty or hold tokens of this model, got a cache that another model has filled")
    if inputs.get("position_ids") is not None:
        raise ValueError("position_ids must be None with a cache, which keeps the positions of the tokens before")


def _common_columns(known: Conversation, ids: Tensor, mask: Tensor) -> int:
    """How many columns agree; not the last one, whose logits are needed."""
    count = min(known.ids.shape[1], ids.shape[1] - 1)
    ids, mask = ids[:, :count], mask[:, :count]
    same = (known.mask[:, :count] == mask) & ((known.ids[:, :count] == ids) | ~mask)
    return int(same.all(0).int().cumprod(0).sum())


def _blocks(
    config: KeyeConfig, names: tuple[str, str, str], ids: Tensor, mask: Tensor, inputs: dict[str, Any], known: list[Block],
    kept: int, pixels_of: dict[Block, Tensor],
) -> list[Block]:  # fmt: skip
    """The images, or the videos, of a conversation. If `inputs` has only those that are not `known`, the others are added.

    Adds the pixels of those in `inputs` to `pixels_of`.
    """
    kind, pixels_name, grids_name = names
    pixels, grid_thw, merge = inputs.get(pixels_name), inputs.get(grids_name), config.vision_config.spatial_merge_size
    checks.check_given_together(pixels_name, pixels, grids_name, grid_thw)
    grids: list[Any] = []
    seconds: list[float | None] = []
    if pixels is not None and grid_thw is not None:
        checks.check_patches(pixels, config.vision_config.patch_shape)
        grids = check_grid_thw(grid_thw, pixels.shape[0], merge)
        seconds = [None] * len(grids)
    if kind == "video" and grids:
        times = checks.to_seconds(inputs.get("second_per_grid_ts"))
        check_seconds(config, grid_thw, times)
        values = [1.0] if times is None else times.flatten().tolist()
        seconds = values * len(grids) if len(values) == 1 else values
    free = (ids == (config.image_token_id if kind == "image" else config.video_token_id)) & mask
    patches = [t * h * w for t, h, w in grids]
    given, total = sum(patches) // merge**2, int(free.sum())
    carried = [] if given == total else [block for block in known if block.kind == kind and block.end <= kept]
    for block in carried:
        free[block.sequence, block.start : block.end] = False
    columns = free.flatten().nonzero()[:, 0].tolist()
    if given != len(columns):
        raise ValueError(
            f"{grids_name} must describe the {total} {kind} placeholders of input_ids, or the {len(columns)} of them that are "
            f"not in the cache, got {given} merged patches"
        )
    found, length, first, row = list(carried), ids.shape[1], 0, 0
    for grid, count, time in zip(grids, patches, seconds, strict=True):
        last = first + count // merge**2 - 1
        (sequence, start), (last_sequence, end) = divmod(columns[first], length), divmod(columns[last], length)
        # A block over two sequences is never kept
        start, end = (max(start - 1, 0), end + 1) if sequence == last_sequence else (0, length)
        own = inputs[pixels_name][row : row + count]
        block = Block(kind, sequence, start, end, grid, time, _digest(own))
        pixels_of[block] = own
        found.append(block)
        first, row = last + 1, row + count
    return found


def _digest(pixels: Tensor) -> bytes:
    data = pixels.detach().cpu().contiguous().view(torch.uint8).numpy()
    return sha256(data.data).digest() + str(pixels.dtype).encode()


def _end_of_whole_blocks(columns: int, blocks: list[Block], known: set[Block]) -> int:
    """The most columns, up to this many, that cut no block and have only `known` ones."""
    while cut := [b.start for b in blocks if b.start < columns and (b.end > columns or b not in known)]:
        columns = min(cut)
    return columns


def _grids(blocks: list[Block]) -> Tensor | None:
    return torch.tensor([block.grid for block in blocks], device="cpu") if blocks else None
