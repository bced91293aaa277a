"""The geometry of a packed vision batch: segments by frame or by video, and the cache of frames."""

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from keye_kernels.geometry import VisionBatch, _make_frame


def test_segments_by_frame_or_by_video():
    grid = torch.tensor([[2, 4, 6], [1, 8, 2]])
    assert VisionBatch.build(grid, 64, table_side=6).segments.cu_seqlens.tolist() == [0, 48, 64]
    by_frame = VisionBatch.build(grid, 64, table_side=6, segment_by_frame=True).segments
    assert by_frame.cu_seqlens.tolist() == [0, 24, 48, 64]
    assert by_frame.max_seqlen == 24 and by_frame.lengths == (24, 24, 16)


def test_default_devices_and_fake_tensors_do_not_change_the_cached_geometry():
    def build():
        return VisionBatch.build(torch.tensor([[1, 4, 6]], device="cpu"), 24, table_side=5, device=torch.device("cpu"))

    expected = build()
    _make_frame.cache_clear()
    with torch.device("meta"):
        build()
    _make_frame.cache_clear()
    grid = torch.tensor([[1, 4, 6]])
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = VisionBatch.build(grid, 24, table_side=5, device=torch.device("cpu"))
    assert isinstance(fake.position_ids, FakeTensor)
    found = build()
    assert torch.equal(found.segments.cu_seqlens, expected.segments.cu_seqlens)
    for name in ("position_ids", "corner_index", "corner_weight", "raster_index"):
        assert type(getattr(found, name)) is torch.Tensor
        assert torch.equal(getattr(found, name), getattr(expected, name))
