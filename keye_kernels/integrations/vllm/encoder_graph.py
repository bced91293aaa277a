"""vLLM's CUDA graphs of the vision encoder (option `cudagraph_mm_encoder`): the tower and the projector of an image batch.

vLLM captures one graph for each of its token budgets. Before a replay it copies the patches and the geometry of the images to the
buffers of the smallest graph that they fit in. The patches behind those of the images belong to no attention segment, and nobody
reads their embeddings.
Symbols: T patches of a graph, S attention segments, m merge size.
"""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.worker.encoder_cudagraph_defs import (
    EncoderCudaGraphCaptureInputs,
    EncoderCudaGraphConfig,
    EncoderCudaGraphReplayBuffers,
    EncoderItemSpec,
)

from keye_kernels.geometry import VisionBatch
from keye_kernels.segments import Segments

# In merged patches. An image of 256 patches takes the smallest graph; beyond 4096 patches the GPU is busy without a graph.
MIN_TOKEN_BUDGET, MAX_TOKEN_BUDGET = 64, 1024
INPUTS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
GEOMETRY = ("position_ids", "corner_index", "corner_weight", "raster_index")  # fields of VisionBatch


class EncoderCudaGraphMixin:
    """The methods of vLLM's protocol `SupportsEncoderCudaGraph`, which must be among the base classes behind this one."""

    def get_encoder_cudagraph_config(self) -> EncoderCudaGraphConfig:
        """Raises ValueError with LoRA on the tower or the projector: a graph would keep the adapters of its capture."""
        if self._has_encoder_lora:
            raise ValueError("cudagraph_mm_encoder must be False with enable_tower_connector_lora=True, got True")
        return EncoderCudaGraphConfig(
            # With a segment for each frame, most programs of a graph that fits videos would have no work in a batch of images
            modalities=["image"] if self.visual.vision_model.segment_by_frame else ["image", "video"],
            buffer_keys=["pixel_values", "cu_seqlens", *GEOMETRY],
            out_hidden_size=self.config.hidden_size,
            padding_logics={"cu_seqlens": _copy_offsets, "position_ids": _copy_position_ids},
        )

    def get_encoder_cudagraph_budget_range(self, vllm_config: VllmConfig) -> tuple[int, int]:
        limits = vllm_config.scheduler_config.max_num_batched_tokens, vllm_config.model_config.max_model_len
        largest = min(MAX_TOKEN_BUDGET, *limits)
        return min(MIN_TOKEN_BUDGET, largest), largest

    def get_input_modality(self, mm_kwargs: dict[str, Any]) -> str:
        return next(modality for modality, (pixels, _) in INPUTS.items() if pixels in mm_kwargs)

    def get_encoder_cudagraph_item_specs(self, mm_kwargs: dict[str, Any]) -> list[EncoderItemSpec]:
        patches = self._inputs(mm_kwargs)[1].prod(1).tolist()
        return [EncoderItemSpec(input_size=n, output_tokens=n // self._merge_size**2) for n in patches]

    def select_encoder_cudagraph_items(self, mm_kwargs: dict[str, Any], indices: list[int]) -> dict[str, Any]:
        pixels, grids = self._inputs(mm_kwargs)
        parts = pixels.split(grids.prod(1).tolist())
        names = INPUTS[self.get_input_modality(mm_kwargs)]
        selected = torch.cat([parts[i] for i in indices]) if indices else pixels[:0]
        return dict(zip(names, (selected, grids[indices]), strict=True))

    def prepare_encoder_cudagraph_capture_inputs(
        self, token_budget: int, max_batch_size: int, max_frames_per_batch: int, device: torch.device, dtype: torch.dtype,
        path: str = "default", axis_keys: tuple[Hashable, ...] | None = None,
    ) -> EncoderCudaGraphCaptureInputs:  # fmt: skip
        """Buffers for `token_budget` · m² patches in at most `max_batch_size` segments. They hold one image of that size."""
        merge_size, embeddings = self._merge_size, self.visual.vision_model.embeddings
        batch = self._geometry(torch.tensor([[1, merge_size, token_budget * merge_size]]), device)
        patch_shape = embeddings.patch_embedding.weight.shape[1:]
        pixels = torch.zeros(token_budget * merge_size**2, *patch_shape, dtype=dtype, device=device)
        buffers = _buffers(pixels, batch)
        offsets = torch.empty(max_batch_size + 1, dtype=torch.int32, device=device)
        _copy_offsets(offsets, buffers["cu_seqlens"])
        return EncoderCudaGraphCaptureInputs(values=buffers | {"cu_seqlens": offsets})

    def prepare_encoder_cudagraph_replay_buffers(
        self, mm_kwargs: dict[str, Any], max_batch_size: int, max_frames_per_batch: int, path: str = "default"
    ) -> EncoderCudaGraphReplayBuffers:
        """What vLLM copies to the start of the buffers of the graph."""
        pixels, grids = self._inputs(mm_kwargs)
        return EncoderCudaGraphReplayBuffers(values=_buffers(pixels, self._geometry(grids, pixels.device)))

    def encoder_cudagraph_forward(self, inputs: dict[str, Tensor], path: str = "default") -> Tensor:
        """Embeddings [T/m², hidden] from the buffers. Reads no values on the CPU, so that a graph serves any geometry."""
        pixels, table_side = inputs["pixel_values"], self.visual.vision_model.tower_config.table_side
        # Zeros instead of uninitialized memory: quantized layers may compute one scale from all rows
        segments = Segments(inputs["cu_seqlens"], pixels.shape[0], covers_all_tokens=False)
        geometry = [inputs[name] for name in GEOMETRY]
        batch = VisionBatch(segments, *geometry, None, table_side, self._merge_size)
        return self._encode(pixels, batch)

    def encoder_eager_forward(self, mm_kwargs: dict[str, Any], path: str = "default") -> Tensor:
        """Embeddings of images that no graph fits, in one tensor."""
        pixels, grids = self._inputs(mm_kwargs)
        return self._encode(pixels, self._geometry(grids, pixels.device))

    def _encode(self, pixels: Tensor, batch: VisionBatch) -> Tensor:
        # Through the modules that vLLM calls: it may have replaced their forwards, for offloaded weights for instance
        return self.mlp_AR(self.visual(pixel_values=pixels, image_grid_thw=batch), None)

    def _inputs(self, mm_kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        pixels, grids = INPUTS[self.get_input_modality(mm_kwargs)]
        return mm_kwargs[pixels], mm_kwargs[grids]

    def _geometry(self, grids: Tensor, device: torch.device) -> VisionBatch:
        return self.visual.vision_model.geometry(grids, int(grids.prod(1).sum()), device)

    @property
    def _merge_size(self) -> int:
        return self.config.vision_config.spatial_merge_size


def _buffers(pixels: Tensor, batch: VisionBatch) -> dict[str, Tensor]:
    return {"pixel_values": pixels, "cu_seqlens": batch.segments.cu_seqlens, **{name: getattr(batch, name) for name in GEOMETRY}}


def _copy_offsets(buffer: Tensor, offsets: Tensor) -> None:
    """The segments behind those of the images are empty."""
    buffer[: len(offsets)] = offsets
    buffer[len(offsets) :] = offsets[-1]


def _copy_position_ids(buffer: Tensor, position_ids: Tensor) -> None:
    buffer.zero_()
    buffer[:, : position_ids.shape[1]] = position_ids
