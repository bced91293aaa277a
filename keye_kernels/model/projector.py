"""The projector `mlp_AR`: merges 2x2 patches and maps them to the embedding space of the text model."""

from torch import Tensor, nn

from keye_kernels import ops
from keye_kernels.editions import edition_of
from keye_kernels.geometry import VisionBatch

from .config import KeyeConfig

LAYER_NORM_EPS = 1e-5  # a constant of the official code; the eps of the tower is in the config


class Projector(nn.Module):
    """LayerNorm and 2x2 merge, in the order of the edition, then linear, GELU, linear.

    See `docs/models/keye_vl_1_5.md`, "Projector", and `docs/models/keye_vl_preview.md`, "Projector".

    Args:
        config: configuration of the model.
        impl: implementation of its operator.
    """

    def __init__(self, config: KeyeConfig, impl: str):
        super().__init__()
        vision = config.vision_config
        self.merge_size, self.impl = vision.spatial_merge_size, impl
        width = vision.hidden_size * self.merge_size**2
        norm_width = vision.hidden_size if edition_of(config.model_type).norm_before_merge else width
        self.pre_norm = nn.LayerNorm(norm_width, eps=LAYER_NORM_EPS)
        self.linear_1 = nn.Linear(width, width)
        self.linear_2 = nn.Linear(width, config.hidden_size)

    def forward(self, features: Tensor, batch: VisionBatch) -> Tensor:
        """Maps features [T, C], in the order of `batch`, to embeddings [T/4, hidden]."""
        weights = [p for layer in (self.pre_norm, self.linear_1, self.linear_2) for p in (layer.weight, layer.bias)]
        return ops.patch_merge_projection(
            features, batch, *weights, merge_size=self.merge_size, eps=self.pre_norm.eps, impl=self.impl
        )
