"""CUDA graphs of vision tower and projector: small batches of images are encoded with one launch instead of several hundred.

The layers also compute the patches that pad a batch to the size of its bucket, except for attention. Larger batches run without
a graph: they keep the GPU busy.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from keye_kernels.geometry import Grid, VisionBatch, check_grid_thw, patch_tensors, segment_lengths
from keye_kernels.host_copy import StaticTensors
from keye_kernels.ops.implementation import default_impl
from keye_kernels.segments import PaddedSegments

from .graphs import Entry, GraphCache, ModuleState

if TYPE_CHECKING:
    from .keye import Keye

PATCH_BUCKETS = (256, 512, 768, 1024, 1280, 1536, 2048, 2560, 3072, 4096)


class Bucket(NamedTuple):
    """What the batches of one graph have in common: upper bounds of their sizes, and everything that is chosen by the caller."""

    num_patches: int
    num_segments: int
    max_seqlen: int
    pixel_dtype: torch.dtype
    default_impl: str  # of `use_impl` and KEYE_KERNELS_IMPL

    @classmethod
    def of(cls, lengths: list[int], pixel_dtype: torch.dtype) -> "Bucket | None":
        """The smallest bucket for segments of these lengths; None if there is none."""
        patches = next((size for size in PATCH_BUCKETS if sum(lengths) <= size), None)
        if patches is None or not lengths:
            return None
        # Launch configs depend on the longest segment, tile schedules on the number of segments
        longest = min(patches, _power_of_2(max(lengths)))
        return cls(patches, _power_of_2(len(lengths)), longest, pixel_dtype, default_impl())


class ImageGraphs(GraphCache):
    """The graphs of the vision tower and the projector of one model."""

    doing = "images are encoded"

    def encode(self, model: "Keye", pixel_values: Tensor, grid_thw: Tensor) -> Tensor | None:
        """`model.get_image_features` of checked patches on the model's device. None if this has to run without a graph."""
        tower, device = model.visual, pixel_values.device
        if not self.may_run(device):
            return None
        grids = check_grid_thw(grid_thw, pixel_values.shape[0], model.config.vision_config.spatial_merge_size)
        lengths = segment_lengths(grids, tower.segment_by_frame)
        dtype = torch.uint8 if pixel_values.dtype == torch.uint8 else tower.position_embedding.weight.dtype
        bucket = Bucket.of(lengths, dtype)
        if bucket is None:
            return None
        return self.run(
            (tower, model.mlp_AR),
            device,
            bucket,
            make=lambda state: _ImageEntry(model, state, bucket, device),
            set_inputs=lambda entry: entry.set_inputs(pixel_values, grids, lengths),
            take=lambda entry, output: output[: len(pixel_values) // entry.batch.merge_size**2].clone(),
        )


class _ImageEntry(Entry):
    def __init__(self, model: "Keye", state: ModuleState, bucket: Bucket, device: torch.device):
        super().__init__((model.visual, model.mlp_AR), state, device)
        num_patches, config = bucket.num_patches, model.config.vision_config
        self.pixels = torch.zeros(num_patches, *config.patch_shape, dtype=bucket.pixel_dtype, device=device)
        self.segments = PaddedSegments(bucket.num_segments, num_patches, bucket.max_seqlen, device)
        self.geometry = StaticTensors([
            ((2, num_patches), torch.int32), ((num_patches, 4), torch.int32), ((num_patches, 4), torch.float32),
            ((num_patches,), torch.int64),
        ], device)  # fmt: skip
        position_ids, corner_index, corner_weight, raster_index = self.geometry.views
        self.batch = VisionBatch(
            self.segments, position_ids, corner_index, corner_weight, raster_index, None,
            config.table_side, config.spatial_merge_size,
        )  # fmt: skip
        self.bytes = self.pixels.nbytes + self.geometry.buffer.nbytes

    def set_inputs(self, pixel_values: Tensor, grids: list[Grid], lengths: list[int]) -> None:
        self.pixels[: len(pixel_values)].copy_(pixel_values)
        *tensors, _ = patch_tensors(grids, self.batch.table_side, self.batch.merge_size, "block")
        self.geometry.overwrite(tensors)
        self.segments.update(lengths)

    def forward(self) -> Tensor:
        tower, projector = self.modules
        return projector(tower(self.pixels, self.batch), self.batch)


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
