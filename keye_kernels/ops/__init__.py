"""The public operators. Each checks its arguments, chooses an implementation and calls one registered torch.library operator."""

from .cache_attention import cache_attention
from .elementwise import add_norm, silu_mul
from .implementation import use_impl
from .linear_few_rows import linear_few_rows
from .patch_merge import patch_merge_projection
from .position_embedding_2d import position_embedding_2d
from .rope import rope_2d, rope_3d
from .rope_cache import rope_3d_to_cache
from .varlen_attention import varlen_attention
from .vision_batch import build_vision_batch as build_vision_batch

__all__ = [
    "add_norm",
    "cache_attention",
    "linear_few_rows",
    "patch_merge_projection",
    "position_embedding_2d",
    "rope_2d",
    "rope_3d",
    "rope_3d_to_cache",
    "silu_mul",
    "use_impl",
    "varlen_attention",
]
