"""Eager PyTorch, one function per operator: defines the right result, and is the fast path on a CPU.

Every function computes in float32 (float64 for float64 inputs), rounds once to the dtype of its input at the end, needs memory
linear in the number of tokens, and works under autograd. Arguments are checked in `keye_kernels.ops`, not here.
Symbols: T tokens or patches, H heads, D head dim, C channels, S segments.
"""

from .cache_attention import cache_attention
from .elementwise import add_norm, silu_mul
from .linear import linear, linear_few_rows
from .patch_merge import patch_merge_projection
from .position_embedding_2d import position_embedding_2d
from .rope import compute_dtype, rms_norm, rope, rope_to_cache, rotate, rotation_tables, write_slots
from .varlen_attention import varlen_attention

__all__ = [
    "add_norm",
    "cache_attention",
    "compute_dtype",
    "linear",
    "linear_few_rows",
    "patch_merge_projection",
    "position_embedding_2d",
    "rms_norm",
    "rope",
    "rope_to_cache",
    "rotate",
    "rotation_tables",
    "silu_mul",
    "varlen_attention",
    "write_slots",
]
