"""CUDA graphs of vision tower and projector: small batches of images are encoded with one launch instead of several hundred.

A graph serves all batches of one bucket: up to a number of patches, of attention segments, and of patches in a segment. Its
inputs are copied into tensors of the bucket's size. The layers also compute the patches that pad a batch, except for attention.
Larger batches run without a graph: they keep the GPU busy.
"""

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from keye_kernels.geometry import Grid, VisionBatch, check_grid_thw, patch_tensors, segment_lengths
from keye_kernels.host_copy import StaticTensors
from keye_kernels.ops.implementation import default_impl
from keye_kernels.segments import PaddedSegments

from . import graphs
from .graphs import ModuleState, logger, runs_triton

if TYPE_CHECKING:
    from .keye import Keye
    from .vision import Projector, VisionTower

PATCH_BUCKETS = (256, 512, 768, 1024, 1280, 1536, 2048, 2560, 3072, 4096)
BATCHES_TO_CAPTURE = 2  # the first batch of a bucket compiles kernels and initializes libraries
MAX_GRAPHS = 16  # the least recently used one is freed
DEVICE_TYPES = ("cuda",)


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


class GraphMemory(NamedTuple):
    """Attributes: `captured`, the number of graphs; `bytes`, GPU memory that they hold, with their inputs and outputs."""

    captured: int
    bytes: int


class ImageGraphs:
    """The graphs of one model. They are captured at the second batch of their bucket, and dropped if a module changes."""

    def __init__(self) -> None:
        self._entries: OrderedDict[Bucket, _Entry] = OrderedDict()
        self._lock = threading.Lock()
        self._has_failed = False
        self._pool: object = None
        self._last_use: torch.cuda.Event | None = None

    def __reduce__(self) -> tuple:
        return ImageGraphs, ()  # a copy of the model captures its own graphs

    def clear(self) -> None:
        """Frees the graphs and their memory. They are captured again when they are needed."""
        with self._lock:
            self._clear()

    def _clear(self) -> None:
        self._entries.clear()
        self._pool = None

    def memory(self) -> GraphMemory:
        """What the captured graphs hold."""
        with self._lock:
            captured = [entry.bytes for entry in self._entries.values() if entry.graph is not None]
        return GraphMemory(len(captured), sum(captured))

    def encode(self, model: "Keye", pixel_values: Tensor, grid_thw: Tensor) -> Tensor | None:
        """`model.get_image_features` of checked patches on the model's device. None if this has to run without a graph."""
        tower, device = model.visual, pixel_values.device
        if self._has_failed or not _may_replay(device):
            return None
        grids = check_grid_thw(grid_thw, pixel_values.shape[0], model.config.vision_config.spatial_merge_size)
        lengths = segment_lengths(grids, tower.segment_by_frame)
        dtype = torch.uint8 if pixel_values.dtype == torch.uint8 else tower.position_embedding.weight.dtype
        bucket = Bucket.of(lengths, dtype)
        if bucket is None:
            return None
        with self._lock, torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
            entry = self._entry(tower, model.mlp_AR, bucket, device)
            if entry is None:
                return None
            stream = torch.cuda.current_stream(device)
            if self._last_use is not None:  # on another stream, an earlier batch may still be read
                stream.wait_event(self._last_use)
            entry.set_inputs(pixel_values, grids, lengths)
            output = entry.run()
            features = output[: len(pixel_values) // entry.batch.merge_size**2].clone()
            self._last_use = torch.cuda.Event()
            self._last_use.record(stream)
            # Checked while the GPU runs the graph, which needs no module and keeps the memory of its parameters
            if not entry.is_valid(tower, model.mlp_AR):
                self._clear()
                return None
            return features

    def _entry(self, tower: "VisionTower", projector: "Projector", bucket: Bucket, device: torch.device) -> "_Entry | None":
        """The entry of a bucket, ready to run; None if the modules cannot be captured."""
        entry = self._entries.get(bucket)
        if entry is not None and entry.graph is None and not entry.is_valid(tower, projector):
            self._clear()
            entry = None
        if entry is None:
            state = ModuleState(tower, projector)
            if not state.is_plain or not runs_triton(tower, device):
                return None
            entry = self._entries[bucket] = _Entry(tower, projector, state, bucket, device)
            while len(self._entries) > MAX_GRAPHS:
                self._entries.popitem(last=False)
        elif entry.graph is None:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            try:
                entry.capture(self._pool)
            except RuntimeError as error:
                self._has_failed = True
                self._clear()
                logger.warning("images are encoded without CUDA graphs, because a graph could not be captured: %s", error)
                return None
        self._entries.move_to_end(bucket)
        return entry


class _Entry:
    """One bucket: tensors for its inputs and, from the second batch on, its graph."""

    def __init__(self, tower: "VisionTower", projector: "Projector", state: ModuleState, bucket: Bucket, device: torch.device):
        self.tower, self.projector, self.state = tower, projector, state
        self.kept = [x.detach() for module in (tower, projector) for x in module.parameters()]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.bytes = 0
        num_patches, config = bucket.num_patches, tower.config
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

    def set_inputs(self, pixel_values: Tensor, grids: list[Grid], lengths: list[int]) -> None:
        self.pixels[: len(pixel_values)].copy_(pixel_values)
        *tensors, _ = patch_tensors(grids, self.batch.table_side, self.batch.merge_size, "block")
        self.geometry.overwrite(tensors)
        self.segments.update(lengths)

    def is_valid(self, tower: "VisionTower", projector: "Projector") -> bool:
        return self.state == ModuleState(tower, projector)

    def run(self) -> Tensor:
        """Features of the size of the bucket, which the next replay overwrites."""
        if self.graph is None:
            return self._forward()
        self.graph.replay()
        return self.output

    def capture(self, pool: object) -> None:
        device = self.pixels.device
        before = torch.cuda.memory_reserved(device)
        self.graph, self.output = graphs.capture(self._forward, device, pool)
        self.bytes = self.pixels.nbytes + max(0, torch.cuda.memory_reserved(device) - before)

    def _forward(self) -> Tensor:
        return self.projector(self.tower(self.pixels, self.batch), self.batch)


def _may_replay(device: torch.device) -> bool:
    """Whether nothing but the result of the call is wanted: no gradients, no cast weights, no trace."""
    if device.type not in DEVICE_TYPES or torch.is_grad_enabled() or torch.is_autocast_enabled(device.type):
        return False
    if torch._C._len_torch_function_stack() or _get_current_dispatch_mode() is not None:
        return False
    return not torch.cuda.is_current_stream_capturing()


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
