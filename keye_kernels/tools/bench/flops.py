"""What a request costs in FLOPs, from its grids and the length of its prompt alone."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from keye_kernels.geometry import Grid, segment_lengths
from keye_kernels.model.config import KeyeConfig


@dataclass(frozen=True)
class RequestFlops:
    """Multiplies and adds of the matrix products, two a product; norms, rope and activations are left out."""

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
    """FLOPs of one request: tower, projector, prefill and a step for each further token.

    Attention is counted as it is needed: within its segment in the tower (a whole grid, in 1.5 a frame), of a token to itself and
    those before it in the decoder. The head is computed once for each new token.

    Args:
        grids: (frames, patch rows, patch columns) of every picture and clip of the request.
        prompt_tokens: of the whole prompt, the tokens of pictures and clips among them.
        new_tokens: generated ones; the first comes from the prefill, each other takes a step of the decoder.

    Raises: ValueError for a grid that does not merge, or a prompt shorter than its pictures' tokens.
    """
    vision, merge = config.vision_config, config.vision_config.spatial_merge_size
    if any(min(grid) < 1 or grid[1] % merge or grid[2] % merge for grid in grids):
        raise ValueError(f"grids must hold positive sizes with rows and columns divisible by {merge}, got {grids}")
    patches = sum(t * h * w for t, h, w in grids)
    merged = patches // merge**2
    if prompt_tokens < max(merged, 1):
        raise ValueError(f"prompt_tokens must be at least the {merged} of the grids, and 1, got {prompt_tokens}")
    if new_tokens < 1:
        raise ValueError(f"new_tokens must be at least 1, got {new_tokens}")

    width, layers = vision.hidden_size, vision.num_hidden_layers
    by_patch = 4 * width**2 + 2 * width * vision.intermediate_size
    embedding = vision.num_channels * vision.patch_size**2 * width
    segments = segment_lengths(list(grids), by_frame=config.edition == "1.5")
    wide = width * merge**2

    heads = config.num_attention_heads * config.head_dim
    by_token = config.hidden_size * (2 * heads + 2 * config.num_key_value_heads * config.head_dim)
    by_token += 3 * config.hidden_size * config.intermediate_size
    steps = new_tokens - 1
    # Keys that the prompt's tokens see, then those that each step's token sees
    seen = prompt_tokens * (prompt_tokens + 1) // 2 + steps * prompt_tokens + steps * (steps + 1) // 2
    return RequestFlops(
        vision_linear=2 * patches * (embedding + layers * by_patch),
        vision_attention=4 * width * layers * sum(length**2 for length in segments),
        projector=2 * merged * wide * (wide + config.hidden_size),
        decoder_linear=2 * config.num_hidden_layers * by_token * (prompt_tokens + steps),
        decoder_attention=4 * config.num_hidden_layers * heads * seen,
        head=2 * config.hidden_size * config.vocab_size * new_tokens,
    )
