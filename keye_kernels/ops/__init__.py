"""The public operators: each checks its arguments, chooses an implementation and calls one registered torch.library op."""

from . import vision_geometry as vision_geometry
from .implementation import use_impl
from .patch_merge import patch_merge_projection
from .position_embedding import position_embedding_2d
from .rope import rope_2d, rope_3d
from .varlen_attention import varlen_attention

__all__ = ["patch_merge_projection", "position_embedding_2d", "rope_2d", "rope_3d", "use_impl", "varlen_attention"]
