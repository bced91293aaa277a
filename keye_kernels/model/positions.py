"""3D position ids of text, image and video tokens.

The rules are in `docs/models/keye_vl_preview.md` and `docs/models/keye_vl_1_5.md`, section "3D position ids". There they are a
loop over tokens; here they are one cumulative sum over the batch. A block is the tokens of one image, one video (Preview) or
one video frame (1.5). A text token advances the position by one, the first token of a block by the extent of the whole block,
every other token of a block by zero. Symbols: B sequences, S tokens per sequence, n grids.
"""

import torch
from torch import Tensor

from keye_kernels.editions import edition_of
from keye_kernels.geometry import check_grid_thw

from .config import KeyeConfig


def inverse_frequencies(theta: float, pairs: int, device: torch.device) -> Tensor:
    """[pairs] float32 rotary frequencies, theta^(-i / pairs).

    Not a module buffer: a buffer would be uninitialised after loading through the meta device, and `.half()` would round it.
    """
    return theta ** -(torch.arange(pairs, dtype=torch.float32, device=device) / pairs)


def rope_index(
    config: KeyeConfig,
    input_ids: Tensor,
    image_grid_thw: Tensor | None,
    video_grid_thw: Tensor | None,
    second_per_grid_ts: Tensor | None,
    attention_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Computes 3D position ids; reads no tensor values on the CPU. Arguments as in `Keye.get_rope_index`.

    Returns:
        position_ids [3, B, S] (time, height, width; 1 on padding) and rope_deltas [B, 1].
    """
    batch_size, length = input_ids.shape
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if image_grid_thw is None and video_grid_thw is None:
        if attention_mask is None:
            position = torch.arange(length, device=input_ids.device).expand(batch_size, -1)
        else:
            position = (mask.cumsum(1) - 1).masked_fill(~mask, 1)
        delta = position.amax(1, keepdim=True) + 1 - length
        return position.expand(3, -1, -1), delta

    advance = mask.long()
    offset = torch.zeros(3, batch_size, length, dtype=torch.int64, device=input_ids.device)
    extent = torch.ones_like(advance)
    for token, grid_thw, seconds in (
        (config.image_token_id, image_grid_thw, torch.zeros(1, device=input_ids.device)),
        (config.video_token_id, video_grid_thw, second_per_grid_ts),
    ):
        if grid_thw is None:
            continue
        block = _Blocks(config, input_ids, mask, token, grid_thw.to(input_ids.device, non_blocking=True), seconds)
        offset = torch.where(block.inside, block.offset, offset)
        extent = torch.where(block.inside, block.extent, extent)
        advance = torch.where(block.inside, block.extent * block.first, advance)
    position = offset + advance.cumsum(1) - extent
    delta = position.amax(0).masked_fill(~mask, -1).amax(1, keepdim=True) + 1 - length
    return position.masked_fill(~mask, 1), delta


class _Blocks:
    """The blocks of one kind of placeholder (image or video).

    Attributes:
        inside: [B, S] bool, True for tokens of a block.
        first: [B, S] bool, True for the first token of each block.
        extent: [B, S], by how much the token's block advances the position.
        offset: [3, B, S], the token's (time, height, width) within its block.
    """

    def __init__(
        self, config: KeyeConfig, input_ids: Tensor, mask: Tensor, token: int, grid_thw: Tensor, seconds: Tensor | None
    ):
        merge = config.vision_config.spatial_merge_size
        t, h, w = grid_thw[:, 0], grid_thw[:, 1] // merge, grid_thw[:, 2] // merge
        placeholder = (input_ids == token) & mask
        block_per_frame = edition_of(config.model_type).position_block_per_frame
        if not block_per_frame:
            grid, local = _after_vision_start(config, input_ids, placeholder, len(grid_thw))
        else:
            grid, local = _by_count(placeholder, t * h * w)
        t, h, w = t[grid], h[grid], w[grid]
        frame, rest = local // (h * w), local % (h * w)
        row, column = rest // w, rest % w
        if not block_per_frame:
            self.inside = (local >= 0) & (local < t * h * w)
            self.first = local == 0
            time = self._time(config, frame, grid, seconds)
            last = self._time(config, t - 1, grid, seconds)
            self.extent = torch.maximum(last, torch.maximum(h, w) - 1) + 1
        else:
            # Each frame is a block; the timestamps are text tokens between the frames
            self.inside = placeholder
            self.first = rest == 0
            time = torch.zeros_like(frame)
            self.extent = torch.maximum(h, w)
        self.offset = torch.stack((time, row, column))

    @staticmethod
    def _time(config: KeyeConfig, frame: Tensor, grid: Tensor, seconds: Tensor | None) -> Tensor:
        """trunc(frame * seconds * tokens_per_second), computed in float32 as in the official code."""
        if seconds is None:
            step = torch.ones((), device=frame.device)
        else:
            step = seconds.to(frame.device, torch.float32).reshape(-1)
            step = step[grid] if step.shape[0] > 1 else step
        return (frame.float() * step * config.vision_config.tokens_per_second).long()


def _after_vision_start(
    config: KeyeConfig, input_ids: Tensor, placeholder: Tensor, grids: int
) -> tuple[Tensor, Tensor]:
    """Preview: a block starts at a placeholder right after <|vision_start|>.

    Returns [B, S] each: the index of the grid of the last block that started at or before the token (grids are consumed in
    order over the batch), and the token's distance from the start of that block; -1 if there is none.
    """
    batch_size, length = input_ids.shape
    starts = torch.zeros_like(placeholder)
    starts[:, 1:] = placeholder[:, 1:] & (input_ids[:, :-1] == config.vision_start_token_id)
    index = torch.arange(length, device=input_ids.device).expand(batch_size, -1)
    begin = torch.where(starts, index, -1).cummax(1).values
    grid = (starts.flatten().cumsum(0) - 1).view(batch_size, length).clamp(0, grids - 1)
    return grid, torch.where(begin < 0, -1, index - begin)


def _by_count(placeholder: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """1.5: placeholders are assigned to grids by count; grid i has `tokens[i]` of them.

    Returns [B, S] each: the index of the token's grid, and the index of the token within that grid.
    """
    ends = tokens.cumsum(0)
    index = (placeholder.flatten().cumsum(0) - 1).view(placeholder.shape)
    grid = torch.searchsorted(ends, index, right=True).clamp(max=len(tokens) - 1)
    return grid, index - (ends - tokens)[grid]


def check_placeholders(
    config: KeyeConfig,
    input_ids: Tensor,
    image_grid_thw: Tensor | None,
    video_grid_thw: Tensor | None,
    attention_mask: Tensor | None,
) -> None:
    """Raises ValueError if the placeholders of a prompt do not match the grids, or the mask hides a placeholder.

    Reads tensor values, so it synchronises with the GPU once per prompt and does not run in compiled code.
    """
    # One copy to the CPU instead of one synchronisation per value
    input_ids, attention_mask = input_ids.cpu(), None if attention_mask is None else attention_mask.cpu()
    merge = config.vision_config.spatial_merge_size
    for name, token, grid_thw in (
        ("image", config.image_token_id, image_grid_thw),
        ("video", config.video_token_id, video_grid_thw),
    ):
        placeholder = input_ids == token
        found = int(placeholder.sum())
        grids = [] if grid_thw is None else check_grid_thw(grid_thw, None, merge)
        expected = sum(t * h * w for t, h, w in grids) // merge**2
        if found != expected:
            raise ValueError(
                f"input_ids must hold one {name} placeholder (id {token}) for each of the {expected} merged patches of "
                f"{name}_grid_thw, got {found}; KeyeProcessor expands the placeholders of a prompt"
            )
        if attention_mask is not None and bool((placeholder & ~attention_mask.bool()).any()):
            raise ValueError(f"attention_mask must be 1 for {name} placeholders, got 0 for some of them")
    block_per_frame = edition_of(config.model_type).position_block_per_frame
    if not block_per_frame and (input_ids[:, -1] == config.vision_start_token_id).any():
        raise ValueError("input_ids must not end with <|vision_start|>, which needs a placeholder after it")
