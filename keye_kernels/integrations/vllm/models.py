"""vLLM's Keye models with this package's operators in the vision tower and the projector.

vLLM keeps what it does best: tensor-parallel and quantised linears, the text model with its compiled rope and paged attention,
the scheduling of pictures. Weights keep their names. T patches of all pictures of a call, C channels, H heads of this rank,
D head dim.
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models import keye, keye_vl1_5
from vllm.multimodal import MULTIMODAL_REGISTRY

from keye_kernels import ops
from keye_kernels.geometry import VisionBatch
from keye_kernels.model import projector

# In the released checkpoints, read by no forward; a checkpoint may leave it out
UNUSED_TABLE = "visual.vision_model.embeddings.packing_position_embedding.weight"

_logger = logging.getLogger("vllm.keye_kernels")


class VisionAttention(nn.Module):
    """Rope and attention between the two linears of vLLM's layer, for the heads of this rank."""

    def __init__(self, stock: keye.KeyeSiglipAttention):
        super().__init__()
        self.qkv_proj, self.out_proj, self.head_dim = stock.qkv_proj, stock.out_proj, stock.head_dim

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None,
        output_attentions: bool,
        cu_seqlens: Tensor,
        rope_emb: tuple[VisionBatch, Tensor],
    ) -> Tensor:
        """[T, C] to [T, C]. vLLM's layer hands `cu_seqlens` and `rope_emb` through: here the batch and its frequencies."""
        batch, inv_freq = rope_emb
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.view(qkv.shape[0], 3, -1, self.head_dim).unbind(1)
        q, k = ops.rope_2d(q, k, batch.position_ids, inv_freq)
        out = ops.varlen_attention(q, k, v, cu_seqlens, batch.max_seqlen)
        return self.out_proj(out.flatten(1))[0]


class VisionTransformer(nn.Module):
    """vLLM's tower, its modules and their names kept, over one packed [T, C] axis.

    Each grid is one attention segment: a picture, a Preview video, or (as vLLM splits them) a frame of a 1.5 video.
    """

    def __init__(self, stock: keye.KeyeSiglipVisionTransformer):
        super().__init__()
        self.config = stock.config
        self.embeddings, self.encoder, self.post_layernorm = stock.embeddings, stock.encoder, stock.post_layernorm
        for layer in self.encoder.layers:
            layer.self_attn = VisionAttention(layer.self_attn)

    def forward(self, pixel_values: Tensor, image_grid_thw: list[tuple[int, int, int]], **_: Any) -> list[Tensor]:
        """[T, 3, 14, 14] patches in raster order to the features of each grid; what else vLLM passes follows from the grids."""
        grid_thw = torch.tensor(image_grid_thw)
        batch = VisionBatch.build(
            grid_thw,
            pixel_values.shape[0],
            table_side=self.config.image_size // self.config.patch_size,
            merge_size=self.config.spatial_merge_size,
            order="raster",
            device=pixel_values.device,
        )
        inv_freq = self.encoder.rotary_pos_emb.inv_freq
        x = self.embeddings.patch_embedding(pixel_values).flatten(1)
        x = ops.position_embedding_2d(x, self.embeddings.position_embedding.weight, batch)
        for layer in self.encoder.layers:
            x = layer(x, None, cu_seqlens=batch.cu_seqlens, rope_emb=(batch, inv_freq))
        return list(self.post_layernorm(x).split(grid_thw.prod(1).tolist()))


class Projector(projector.Projector):
    """The lean projector behind vLLM's call. Each rank has all of it: one operator on whole weights, nothing to gather."""

    def forward(self, image_features: list[Tensor], image_grid_thw: Tensor) -> list[Tensor]:
        """Features [t·h·w, C] of each grid to embeddings [t·h·w/4, hidden] of each."""
        grid_thw = image_grid_thw.cpu()
        merged = super().forward(torch.cat(image_features), grid_thw)
        return list(merged.split((grid_thw.prod(1) // self.merge_size**2).tolist()))


class KeyeKernels:
    """What both editions add to vLLM's class, which stands behind it in the method resolution order."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        lora = vllm_config.lora_config
        # Quantised weights and adapters need vLLM's own linears; a plain Linear would not know them
        self._own_projector = vllm_config.quant_config is None and not (lora and lora.enable_tower_connector_lora)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        replaced = []
        # With --limit-mm-per-prompt at zero there is no tower
        if isinstance(self.visual, keye.KeyeSiglipVisionModel):
            self.visual.vision_model = VisionTransformer(self.visual.vision_model)
            layers = len(self.visual.vision_model.encoder.layers)
            replaced.append(f"position embedding, rope and attention of {layers} vision layers")
        if isinstance(self.mlp_AR, Projector):
            replaced.append("projector")
        _logger.info(
            "keye_kernels in %s: %s (KEYE_KERNELS_VLLM=0 turns it off)",
            type(self).__name__,
            ", ".join(replaced) or "nothing, the model has no vision tower",
        )

    def _build_projector(self, text_config: Any, *args: Any, **kwargs: Any) -> nn.Module:
        if self._own_projector:
            return Projector(text_config.lean(), impl="auto")
        return super()._build_projector(text_config, *args, **kwargs)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return super().load_weights(weights) | {UNUSED_TABLE}


@MULTIMODAL_REGISTRY.register_processor(
    keye.KeyeMultiModalProcessor, info=keye.KeyeProcessingInfo, dummy_inputs=keye.KeyeDummyInputsBuilder
)
class KeyeForConditionalGeneration(KeyeKernels, keye.KeyeForConditionalGeneration):
    """Keye-VL-8B-Preview."""


@MULTIMODAL_REGISTRY.register_processor(
    keye_vl1_5.KeyeVL1_5MultiModalProcessor,
    info=keye_vl1_5.KeyeVL1_5ProcessingInfo,
    dummy_inputs=keye_vl1_5.KeyeVL1_5DummyInputsBuilder,
)
class KeyeVL1_5ForConditionalGeneration(KeyeKernels, keye_vl1_5.KeyeVL1_5ForConditionalGeneration):
    """Keye-VL-1.5-8B."""
