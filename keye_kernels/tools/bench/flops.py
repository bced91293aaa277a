"""Estimates the FLOPs of a request from its grids and the length of its prompt."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from keye_kernels.editions import edition_of
from keye_kernels.geometry import Grid, segment_lengths
from keye_kernels.model.config import KeyeConfig


@dataclass(frozen=True)
class RequestFlops:
    """FLOPs of the matmuls, two per multiply-add. Norms, rope and activations are not counted."""

    vision_linear: int
    vision_attention: int
    projector: int
    decoder_linear: int
    decoder_attention: int
    head: int

    @property
    def total(self) -> int:
        return sum(astuple(self))


def estimate_flops(config: KeyeConfig, grids: Sequence[Grid], prompt_tokens: int, new_tokens: int = 1) -> RequestFlops:
    """FLOPs of one request. `prompt_tokens` includes the tokens of images and videos; `grids` are theirs.

    Attention is counted without padding and masked scores: within a segment in the vision tower (a grid in Preview, a frame in
    1.5), causal in the decoder. The head is computed once per new token; the first new token comes from the prefill. Raises
    ValueError if a grid is not divisible by the merge size, or if `prompt_tokens` is less than the tokens of the grids.
    """
    vision, merge = config.vision_config, config.vision_config.spatial_merge_size
    if any(min(grid) < 1 or grid[1] % merge or grid[2] % merge for grid in grids):
        raise ValueError(f"grids must have positive sizes, with rows and columns divisible by {merge}, got {grids}")
    patches = sum(t * h * w for t, h, w in grids)
    merged = patches // merge**2
    if prompt_tokens < max(merged, 1):
        raise ValueError(f"prompt_tokens must be at least the {merged} of the grids, and 1, got {prompt_tokens}")
    if new_tokens < 1:
        raise ValueError(f"new_tokens must be at least 1, got {new_tokens}")

    width, layers = vision.hidden_size, vision.num_hidden_layers
    weights_per_layer = 4 * width**2 + 2 * width * vision.intermediate_size
    embedding = vision.num_channels * vision.patch_size**2 * width
    segments = segment_lengths(list(grids), by_frame=edition_of(config.model_type).segment_by_frame)
    merged_width = width * merge**2

    heads = config.num_attention_heads * config.head_dim
    decoder_layer = config.hidden_size * (2 * heads + 2 * config.num_key_value_heads * config.head_dim)
    decoder_layer += 3 * config.hidden_size * config.intermediate_size
    steps = new_tokens - 1
    # (query, key) pairs of the prefill and of the decoding steps
    scores = prompt_tokens * (prompt_tokens + 1) // 2 + steps * prompt_tokens + steps * (steps + 1) // 2
    return RequestFlops(
        vision_linear=2 * patches * (embedding + layers * weights_per_layer),
        vision_attention=4 * width * layers * sum(length**2 for length in segments),
        projector=2 * merged * merged_width * (merged_width + config.hidden_size),
        decoder_linear=2 * config.num_hidden_layers * decoder_layer * (prompt_tokens + steps),
        decoder_attention=4 * config.num_hidden_layers * heads * scores,
        head=2 * config.hidden_size * config.vocab_size * new_tokens,
    )
