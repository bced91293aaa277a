"""Vision tower and projector, with one parameter per tensor of the checkpoint, as LoRA, tensor parallelism and saving need it.

The forward of the tower is `keye_kernels.model.vision.vision_forward`. Symbols: T patches, C channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from keye_kernels.geometry import VisionBatch
from keye_kernels.model import fused, vision
from keye_kernels.model.vision import vision_attention, vision_batch, vision_forward
from keye_kernels.plain import is_plain

from .attention import VISION_IMPLEMENTATIONS
from .config import KeyeVisionConfig
from .pretrained import KeyePreTrainedModel


class PatchEmbedding(nn.Conv2d):
    """A convolution over one whole patch, computed as a matmul: [T, 3, 14, 14] to [T, C, 1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.flatten(1), self.weight.flatten(1), self.bias)[..., None, None]


class VisionAttention(nn.Module):
    """Attention within each segment, with separate projections to q, k and v."""

    def __init__(self, config: KeyeVisionConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.lean().head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, batch: VisionBatch, inv_freq: Tensor) -> Tensor:
        impl = VISION_IMPLEMENTATIONS.get(self.config._attn_implementation, "auto")
        return self.out_proj(vision_attention(x, self._project_qkv, batch, inv_freq, impl=impl))

    def _project_qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        # -1: under tensor parallelism a rank has some of the heads
        return tuple(proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))


class VisionLayer(GradientCheckpointingLayer):
    def __init__(self, config: KeyeVisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = vision.VisionMLP(config)

    def forward(self, x: Tensor, batch: VisionBatch, inv_freq: Tensor) -> Tensor:
        impl = fused.impl_for_layer(self)
        attended = self.self_attn(fused.norm(x, self.layer_norm1, impl), batch, inv_freq)
        x, normed = fused.add_norm(attended, x, self.layer_norm2, impl)
        return x + self.mlp(normed)


class KeyeVisionEmbeddings(nn.Module):
    def __init__(self, config: KeyeVisionConfig):
        super().__init__()
        self.patch_embedding = PatchEmbedding(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Embedding(config.lean().table_side ** 2, config.hidden_size)

    def embed_patches(self, patches: Tensor) -> Tensor:
        """[T, 3, 14, 14] to [T, C]."""
        return self.patch_embedding(patches).flatten(1)

    def position_table(self, device: torch.device) -> Tensor:
        """All learned positions. Calls the module, because an offloaded weight has data only during a call."""
        return self.position_embedding(torch.arange(self.position_embedding.num_embeddings, device=device))


class KeyeVisionEncoder(nn.Module):
    def __init__(self, config: KeyeVisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))


class KeyeVisionTransformer(nn.Module):
    def __init__(self, config: KeyeVisionConfig, segment_by_frame: bool):
        super().__init__()
        self.tower_config, self.segment_by_frame = config.lean(), segment_by_frame
        self.embeddings = KeyeVisionEmbeddings(config)
        self.encoder = KeyeVisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, VisionBatch]:
        config, device = self.tower_config, pixel_values.device
        batch = vision_batch(config, grid_thw, pixel_values.shape[0], self.segment_by_frame, device)
        features = vision_forward(
            pixel_values,
            batch,
            config,
            embed_patches=self.embeddings.embed_patches,
            position_table=self.embeddings.position_table(device),
            layers=self.encoder.layers,
            post_layernorm=self.post_layernorm,
        )
        return features, batch


class KeyeVisionModel(KeyePreTrainedModel):
    """The vision tower. Must agree with `SiglipVisionModel` of the official code.

    See `docs/models/keye_vl_1_5.md` and `docs/models/keye_vl_preview.md`, "Vision tower". `segment_by_frame`: attention runs
    within single frames, see `keye_kernels.editions.Edition`.
    """

    config_class = KeyeVisionConfig
    main_input_name = "pixel_values"
    _tp_plan = {  # noqa: RUF012
        "vision_model.encoder.layers.*.self_attn.q_proj": "colwise",
        "vision_model.encoder.layers.*.self_attn.k_proj": "colwise",
        "vision_model.encoder.layers.*.self_attn.v_proj": "colwise",
        "vision_model.encoder.layers.*.self_attn.out_proj": "rowwise",
        "vision_model.encoder.layers.*.mlp.fc1": "colwise",
        "vision_model.encoder.layers.*.mlp.fc2": "rowwise",
    }

    def __init__(self, config: KeyeVisionConfig, segment_by_frame: bool):
        super().__init__(config)
        self.vision_model = KeyeVisionTransformer(config, segment_by_frame)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.embeddings.patch_embedding

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, VisionBatch]:
        """Encodes patches [T, 3, 14, 14] in raster order to features [T, C] in block order; also returns the geometry."""
        return self.vision_model(pixel_values, grid_thw)


class Projector(vision.Projector):
    """The lean projector, which reads the weights of its layers; layers with adapters or hooks are called instead."""

    def forward(self, features: Tensor, batch: VisionBatch) -> Tensor:
        """Maps features [T, C] in block order to embeddings [T/4, hidden]."""
        if is_plain(self.pre_norm, self.linear_1, self.linear_2):
            return super().forward(features, batch)
        x = self.pre_norm(features.view(-1, *self.pre_norm.normalized_shape))
        return self.linear_2(F.gelu(self.linear_1(x.view(-1, self.merge_size**2 * features.shape[1]))))
