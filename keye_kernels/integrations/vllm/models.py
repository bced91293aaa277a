"""vLLM's Keye models with this package's operators in the vision tower and the projector.

vLLM keeps the tensor-parallel and quantized linear layers, the text model with its compiled rope and paged attention, and the
scheduling of images. The names of the weights do not change.
Symbols: T patches of all images of a call, C channels, n grids, D head dim.
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm import envs
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import ColumnParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.utils import default_unquantized_gemm
from vllm.model_executor.models import keye, keye_vl1_5
from vllm.model_executor.models.interfaces import SupportsEncoderCudaGraph
from vllm.multimodal import MULTIMODAL_REGISTRY

from keye_kernels.editions import edition_of
from keye_kernels.geometry import Grid, VisionBatch
from keye_kernels.model import fused, vision
from keye_kernels.model.vision import vision_attention, vision_batch, vision_forward
from keye_kernels.plain import calls_forward

from .encoder_graph import EncoderCudaGraphMixin

# In the released checkpoints, but not used by the model; other checkpoints may not have it
UNUSED_TABLE = "visual.vision_model.embeddings.packing_position_embedding.weight"

_logger = logging.getLogger("vllm.keye_kernels")


class VisionAttention(nn.Module):
    """Attention within each segment, with vLLM's linear layers, for the heads of this rank."""

    def __init__(self, vllm_module: keye.KeyeSiglipAttention):
        super().__init__()
        self.qkv_proj, self.out_proj, self.head_dim = vllm_module.qkv_proj, vllm_module.out_proj, vllm_module.head_dim

    def forward(self, x: Tensor, batch: VisionBatch, inv_freq: Tensor) -> Tensor:
        return self.out_proj(vision_attention(x, self._project_qkv, batch, inv_freq))[0]

    def _project_qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv_proj(x)[0].view(x.shape[0], 3, -1, self.head_dim).unbind(1)


class VisionLayer(nn.Module):
    """A layer of vLLM's tower with the arguments of `vision_forward`."""

    def __init__(self, vllm_module: keye.KeyeSiglipEncoderLayer):
        super().__init__()
        self.layer_norm1, self.layer_norm2, self.mlp = vllm_module.layer_norm1, vllm_module.layer_norm2, vllm_module.mlp
        self.self_attn = VisionAttention(vllm_module.self_attn)

    def forward(self, x: Tensor, batch: VisionBatch, inv_freq: Tensor) -> Tensor:
        attended = self.self_attn(fused.norm(x, self.layer_norm1), batch, inv_freq)
        x, normed = fused.add_norm(attended, x, self.layer_norm2)
        return x + self._run_mlp(normed)

    def _run_mlp(self, x: Tensor) -> Tensor:
        if not _is_matmul_and_tanh_gelu(self.mlp) or not fused.has_gelu_epilogue(x, self.mlp.fc1.weight):
            return self.mlp(x)
        return self.mlp.fc2(fused.matmul_gelu(x, self.mlp.fc1.weight, self.mlp.fc1.bias))[0]


def _is_matmul_and_tanh_gelu(mlp: nn.Module) -> bool:
    """Whether the first half of vLLM's MLP is one matmul with a bias, of this rank's channels, and GELU in its tanh form.

    Not with LoRA, quantized weights, or where vLLM was told to run another matmul than torch's.
    """
    fc1, gelu = mlp.fc1, mlp.activation_fn
    if type(fc1) is not ColumnParallelLinear or not all(map(calls_forward, (mlp, fc1, gelu))):
        return False
    is_matmul = type(fc1.quant_method) is UnquantizedLinearMethod and not envs.VLLM_BATCH_INVARIANT
    is_torch = is_matmul and getattr(fc1.quant_method, "_gemm_impl", None) is default_unquantized_gemm
    has_bias = fc1.bias is not None and not fc1.skip_bias_add and not fc1.gather_output
    return is_torch and has_bias and type(gelu) is nn.GELU and gelu.approximate == "tanh"


class VisionTransformer(nn.Module):
    """vLLM's tower on one packed [T, C] axis. The modules keep vLLM's names."""

    def __init__(self, vllm_module: keye.KeyeSiglipVisionTransformer, segment_by_frame: bool):
        super().__init__()
        self.tower_config, self.segment_by_frame = vllm_module.config.lean(), segment_by_frame
        self.embeddings, self.encoder = vllm_module.embeddings, vllm_module.encoder
        self.post_layernorm = vllm_module.post_layernorm
        for index, layer in enumerate(self.encoder.layers):
            self.encoder.layers[index] = VisionLayer(layer)

    def geometry(self, grid_thw: Tensor, num_patches: int, device: torch.device) -> VisionBatch:
        return vision_batch(self.tower_config, grid_thw, num_patches, self.segment_by_frame, device)

    def forward(self, pixel_values: Tensor, image_grid_thw: list[Grid] | VisionBatch, **_: Any) -> tuple[Tensor, VisionBatch]:
        """Patches [T, 3, 14, 14] in raster order to features [T, C] in block order, and the geometry for the projector.

        vLLM passes grids, the CUDA graphs pass their geometry. vLLM's other arguments are ignored: the grids determine them.
        """
        batch = image_grid_thw
        if not isinstance(batch, VisionBatch):
            batch = self.geometry(torch.tensor(image_grid_thw), pixel_values.shape[0], pixel_values.device)
        features = vision_forward(
            pixel_values,
            batch,
            self.tower_config,
            embed_patches=lambda patches: self.embeddings.patch_embedding(patches).flatten(1),
            position_table=self.embeddings.position_embedding.weight,
            layers=self.encoder.layers,
            post_layernorm=self.post_layernorm,
        )
        return features, batch


def _split(embeddings: Tensor, image_grid_thw: Tensor | None, merge_size: int) -> list[Tensor] | Tensor:
    """The embeddings [t·h·w/m², hidden] of each grid; without grids, all of them."""
    if image_grid_thw is None:
        return embeddings
    return list(embeddings.split((image_grid_thw.prod(1) // merge_size**2).tolist()))


class Projector(vision.Projector):
    """The lean projector with the arguments of vLLM's. Each rank has all the weights, so that no gather is needed."""

    def forward(self, encoded: tuple[Tensor, VisionBatch], image_grid_thw: Tensor | None) -> list[Tensor] | Tensor:
        """Maps the output of `VisionTransformer` to embeddings."""
        return _split(super().forward(*encoded), image_grid_thw, self.merge_size)


class VllmProjector(nn.Module):
    """vLLM's layers of the projector, which may be quantized or have LoRA, on the patches of all images."""

    def __init__(self, vllm_module: nn.Module):
        super().__init__()
        self.pre_norm, self.act = vllm_module.pre_norm, vllm_module.act
        self.linear_1, self.linear_2 = vllm_module.linear_1, vllm_module.linear_2

    def forward(self, encoded: tuple[Tensor, VisionBatch], image_grid_thw: Tensor | None) -> list[Tensor] | Tensor:
        """Maps the output of `VisionTransformer` to embeddings."""
        features, batch = encoded
        # In block order the merge is a view; LayerNorm is before it (Preview) or after it (1.5)
        normed = self.pre_norm(features.view(-1, *self.pre_norm.normalized_shape))
        hidden = self.act(self.linear_1(normed.view(-1, features.shape[1] * batch.merge_size**2))[0])
        return _split(self.linear_2(hidden)[0], image_grid_thw, batch.merge_size)


class KeyeKernelsMixin(EncoderCudaGraphMixin):
    """Replaces the modules of vLLM's class of either edition, which must be the next base class."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        lora = vllm_config.lora_config
        self._has_encoder_lora = bool(lora and lora.enable_tower_connector_lora)
        # Quantized weights and LoRA need vLLM's linear layers
        self._replaces_projector = vllm_config.quant_config is None and not self._has_encoder_lora
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        replaced = []
        # There is no tower if --limit-mm-per-prompt is zero
        if isinstance(self.visual, keye.KeyeSiglipVisionModel):
            segment_by_frame = edition_of(self.config.model_type).segment_by_frame
            self.visual.vision_model = VisionTransformer(self.visual.vision_model, segment_by_frame)
            layers = len(self.visual.vision_model.encoder.layers)
            replaced.append(f"position embedding, rope and attention of {layers} vision layers")
        if isinstance(self.mlp_AR, Projector):
            replaced.append("projector")
        names = ", ".join(replaced) or "nothing, the model has no vision tower"
        _logger.info("keye_kernels in %s: %s (KEYE_KERNELS_VLLM=0 turns it off)", type(self).__name__, names)

    def _build_projector(self, text_config: Any, *args: Any, **kwargs: Any) -> nn.Module:
        if self._replaces_projector:
            return Projector(text_config.lean(), impl="auto")
        return VllmProjector(super()._build_projector(text_config, *args, **kwargs))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return super().load_weights(weights) | {UNUSED_TABLE}


@MULTIMODAL_REGISTRY.register_processor(
    keye.KeyeMultiModalProcessor, info=keye.KeyeProcessingInfo, dummy_inputs=keye.KeyeDummyInputsBuilder
)
class KeyeForConditionalGeneration(KeyeKernelsMixin, keye.KeyeForConditionalGeneration, SupportsEncoderCudaGraph):
    """Keye-VL-8B-Preview."""


@MULTIMODAL_REGISTRY.register_processor(
    keye_vl1_5.KeyeVL1_5MultiModalProcessor,
    info=keye_vl1_5.KeyeVL1_5ProcessingInfo,
    dummy_inputs=keye_vl1_5.KeyeVL1_5DummyInputsBuilder,
)
class KeyeVL1_5ForConditionalGeneration(KeyeKernelsMixin, keye_vl1_5.KeyeVL1_5ForConditionalGeneration, SupportsEncoderCudaGraph):
    """Keye-VL-1.5-8B."""
