"""The projector `mlp_AR`: from features of patches to embeddings of tokens."""

from torch import Tensor, nn

from keye_kernels import ops
from keye_kernels.geometry import VisionBatch

from .config import KeyeConfig

LAYER_NORM_EPS = 1e-5  # fixed in the official code; the tower's own is another


class Projector(nn.Module):
    """Merges 2x2 patches. Preview normalises each patch (`pre_norm` of C), 1.5 the merged vector (of 4C)."""

    def __init__(self, config: KeyeConfig, impl: str):
        super().__init__()
        channels, self.merge_size, self.impl = (
            config.vision_config.hidden_size,
            config.vision_config.spatial_merge_size,
            impl,
        )
        width = channels * self.merge_size**2
        self.pre_norm = nn.LayerNorm(channels if config.edition == "preview" else width, eps=LAYER_NORM_EPS)
        self.linear_1 = nn.Linear(width, width)
        self.linear_2 = nn.Linear(width, config.hidden_size)

    def forward(self, features: Tensor, batch: VisionBatch) -> Tensor:
        """[T, C] in the order of `batch` to [T/4, hidden]."""
        weights = [p for layer in (self.pre_norm, self.linear_1, self.linear_2) for p in (layer.weight, layer.bias)]
        return ops.patch_merge_projection(
            features, batch, *weights, merge_size=self.merge_size, eps=LAYER_NORM_EPS, impl=self.impl
        )
