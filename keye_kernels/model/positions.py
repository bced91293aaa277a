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
from keye_kernels.host_copy import copy_to_device

from .config import MAX_POSITION, KeyeConfig


def inverse_frequencies(theta: float, pairs: int, device: torch.device) -> Tensor:
    """[pairs] float32 rotary frequencies, theta^(-i / pairs).

    Not a module buffer: a buffer would be uninitialized after loading through the meta device, and `.half()` would round it.
    """
    return float(theta) ** -(torch.arange(pairs, dtype=torch.float32, device=device) / pairs)


def rope_index(
    config: KeyeConfig,
    input_ids: Tensor,
    image_grid_thw: Tensor | None,
    video_grid_thw: Tensor | None,
    second_per_grid_ts: Tensor | None,
    attention_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`Keye.get_rope_index` without checks. Reads no tensor values on the CPU."""
    batch_size, length = input_ids.shape
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if image_grid_thw is None and video_grid_thw is None:
        position = (mask.cumsum(1) - 1).masked_fill(~mask, 1)
        return position.expand(3, -1, -1), position.amax(1, keepdim=True) + 1 - length

    advance = mask.long()
    offset = torch.zeros(3, batch_size, length, dtype=torch.int64, device=input_ids.device)
    extent = torch.ones_like(advance)
    for token, grid_thw, seconds in (
        (config.image_token_id, image_grid_thw, torch.zeros(1, device=input_ids.device)),
        (config.video_token_id, video_grid_thw, second_per_grid_ts),
    ):
        if grid_thw is None:
            continue
        grid_thw = copy_to_device(grid_thw, input_ids.device)
        inside, first, block_extent, block_offset = _blocks(config, input_ids, mask, token, grid_thw, seconds)
        offset = torch.where(inside, block_offset, offset)
        extent = torch.where(inside, block_extent, extent)
        advance = torch.where(inside, block_extent * first, advance)
    position = offset + advance.cumsum(1) - extent
    delta = position.amax(0).masked_fill(~mask, -1).amax(1, keepdim=True) + 1 - length
    return position.masked_fill(~mask, 1), delta


def _blocks(
    config: KeyeConfig, input_ids: Tensor, mask: Tensor, token: int, grid_thw: Tensor, seconds: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The blocks of one kind of placeholder (image or video).

    Returns, for each token [B, S]: whether it is in a block, whether it is the first one of its block, by how much its block
    advances the position; and [3, B, S], its (time, height, width) within its block.
    """
    merge = config.vision_config.spatial_merge_size
    t, h, w = grid_thw[:, 0], grid_thw[:, 1] // merge, grid_thw[:, 2] // merge
    placeholder = (input_ids == token) & mask
    block_per_frame = edition_of(config.model_type).position_block_per_frame
    if block_per_frame:
        grid, local = _by_count(placeholder, t * h * w)
    else:
        grid, local = _after_vision_start(config, input_ids, placeholder, len(grid_thw))
    t, h, w = t[grid], h[grid], w[grid]
    frame, rest = local // (h * w), local % (h * w)
    row, column = rest // w, rest % w
    if block_per_frame:
        # Each frame is a block; the timestamps are text tokens between the frames
        offset = torch.stack((torch.zeros_like(frame), row, column))
        return placeholder, rest == 0, torch.maximum(h, w), offset
    time, last = (_time(config, index, grid, seconds) for index in (frame, t - 1))
    extent = torch.maximum(last, torch.maximum(h, w) - 1) + 1
    return (local >= 0) & (local < t * h * w), local == 0, extent, torch.stack((time, row, column))


def _time(config: KeyeConfig, frame: Tensor, grid: Tensor, seconds: Tensor | None) -> Tensor:
    """trunc(frame * seconds * tokens_per_second), computed in float32 as in the official code."""
    step = (
        torch.ones(1, device=frame.device)
        if seconds is None
        else copy_to_device(seconds, frame.device, torch.float32).reshape(-1)
    )
    step = step[grid] if step.shape[0] > 1 else step
    return (frame.float() * step * config.vision_config.tokens_per_second).long()


def _after_vision_start(config: KeyeConfig, input_ids: Tensor, placeholder: Tensor, grids: int) -> tuple[Tensor, Tensor]:
    """Preview: a block starts at a placeholder right after <|vision_start|>.

    Returns [B, S] each: the grid of the last block that started at or before the token (grids are consumed in order over the
    batch), and the token's distance from the start of that block; -1 if there is none.
    """
    batch_size, length = input_ids.shape
    starts = torch.zeros_like(placeholder)
    starts[:, 1:] = placeholder[:, 1:] & (input_ids[:, :-1] == config.vision_start_token_id)
    index = torch.arange(length, device=input_ids.device).expand(batch_size, -1)
    begin = torch.where(starts, index, -1).cummax(1).values
    grid = (starts.flatten().cumsum(0) - 1).view(batch_size, length).clamp(0, grids - 1)
    return grid, torch.where(begin < 0, -1, index - begin)


def _by_count(placeholder: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """1.5: grid i has the next `tokens[i]` placeholders. Returns [B, S] each: the token's grid, and its index in that grid."""
    ends = tokens.cumsum(0)
    index = (placeholder.flatten().cumsum(0) - 1).view(placeholder.shape)
    grid = torch.searchsorted(ends, index, right=True).clamp(max=len(tokens) - 1)
    return grid, index - (ends - tokens)[grid]


def check_placeholders(
    config: KeyeConfig, input_ids: Tensor, image_grid_thw: Tensor | None, video_grid_thw: Tensor | None, mask: Tensor | None
) -> None:
    """Raises ValueError if the placeholders of a prompt do not match the grids, or `mask` [B, S] hides a placeholder.

    Reads tensor values, so it synchronizes with the GPU once per prompt and does not run in compiled code.
    """
    # One copy to the CPU instead of one synchronization per value
    input_ids, mask = input_ids.cpu(), None if mask is None else mask.cpu()
    merge = config.vision_config.spatial_merge_size
    for name, token, grid_thw in (
        ("image", config.image_token_id, image_grid_thw),
        ("video", config.video_token_id, video_grid_thw),
    ):
        placeholder = input_ids == token
        grids = [] if grid_thw is None else check_grid_thw(grid_thw, None, merge)
        expected = sum(t * h * w for t, h, w in grids) // merge**2
        if (found := int(placeholder.sum())) != expected:
            raise ValueError(
                f"input_ids must hold one {name} placeholder (id {token}) for each of the {expected} merged patches of "
                f"{name}_grid_thw, got {found}; KeyeProcessor expands the placeholders of a prompt"
            )
        if mask is not None and bool((placeholder & ~mask.bool()).any()):
            raise ValueError(f"attention_mask must be 1 for {name} placeholders, got 0 for some of them")
    placeholders = torch.tensor([config.image_token_id, config.video_token_id], device=input_ids.device)
    is_split = (input_ids[:, -1] == config.vision_start_token_id) | torch.isin(input_ids[:, 0], placeholders)
    if is_split.any() and not edition_of(config.model_type).position_block_per_frame:
        raise ValueError("input_ids must not end with <|vision_start|> or start with a placeholder: both must be in one call")


def check_seconds(config: KeyeConfig, video_grid_thw: Tensor | None, seconds: Tensor | None) -> None:
    """Raises ValueError unless `seconds` has one number, or one per video, and keeps positions below MAX_POSITION."""
    values = [1.0] if seconds is None else seconds.flatten().tolist()
    frames = [] if video_grid_thw is None else video_grid_thw[:, 0].tolist()
    if len(values) not in (1, len(frames)):
        raise ValueError(f"second_per_grid_ts must have one number for each of {len(frames)} videos, got {len(values)}")
    longest = max(frames, default=1) * config.vision_config.tokens_per_second
    if not all(0 <= value * longest < MAX_POSITION for value in values):
        expected = f"finite, not negative, and below {MAX_POSITION / longest:g} for these videos"
        raise ValueError(f"second_per_grid_ts must be {expected}, got {values}")


def check_position_range(position_ids: Tensor, further_tokens: int) -> None:
    """Raises ValueError if a position, or that of one of `further_tokens` more, exceeds MAX_POSITION. Synchronizes."""
    largest = int(position_ids.amax())
    if largest + further_tokens > MAX_POSITION:
        limit = f"{MAX_POSITION} (angles of rope are accurate in float32 up to this)"
        raise ValueError(f"position_ids must not exceed {limit}, got {largest} in a cache with room for {further_tokens} tokens")
