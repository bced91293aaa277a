"""Copies to a GPU from pinned memory. The CPU plays the GPU; `tests/gpu` has the test on a real one."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from keye_kernels import host_copy
from keye_kernels.geometry import VisionBatch
from keye_kernels.host_copy import ALIGNMENT_BYTES, StaticTensors, copy_all_to_device, copy_to_device
from keye_kernels.segments import Segments
from tests.helpers.gpu_copies import Copies

CPU = torch.device("cpu")
FIELDS = ("position_ids", "corner_index", "corner_weight", "raster_index", "merge_index")


def test_tensors_are_packed_into_one_aligned_asynchronous_copy(monkeypatch):
    copies = Copies(monkeypatch)
    tensors = [
        torch.arange(5, dtype=torch.int32),
        torch.rand(3, 1, 7),
        torch.empty(0, 4, dtype=torch.int32),
        torch.arange(40).view(4, 10).t(),  # not contiguous
        torch.tensor([1, 2, 3], dtype=torch.uint8),
        torch.tensor(2.5, dtype=torch.float64),
    ]
    found = copy_all_to_device(tensors, CPU)
    assert len(copies.copied) == 1 and copies.all_asynchronous()
    for tensor, other in zip(tensors, found, strict=True):
        assert torch.equal(tensor, other) and tensor.dtype == other.dtype and other.is_contiguous()
        assert other.storage_offset() * other.element_size() % ALIGNMENT_BYTES == 0
    # No two of them overlap
    for other in found:
        other.fill_(0)
    assert torch.equal(found[0], torch.zeros(5, dtype=torch.int32))
    assert copy_all_to_device([], CPU) == []


def test_a_copy_is_asynchronous_and_has_the_values_of_the_moment(monkeypatch):
    copies = Copies(monkeypatch)
    tensor = torch.rand(3, 4)
    expected = tensor.half()
    found = copy_to_device(tensor, CPU, torch.float16)
    assert len(copies.copied) == 1 and copies.all_asynchronous()
    # The cast is made on the CPU: fewer bytes are copied
    assert copies.pinned[0].dtype == torch.float16
    tensor.zero_()
    assert torch.equal(found, expected)
    assert torch.equal(copies.pinned[0], expected)


def test_a_tensor_of_another_device_is_not_pinned(monkeypatch):
    copies = Copies(monkeypatch)
    assert copy_to_device(torch.empty(3, device="meta"), torch.device("meta")).is_meta
    assert copies.pinned == []


def test_the_geometry_of_a_batch_is_one_copy_and_a_schedule_another(monkeypatch):
    grids = torch.tensor([[1, 4, 6], [2, 2, 8]])
    expected = VisionBatch.build(grids, 56, table_side=5, order="raster")
    schedule = expected.segments.schedule(16, False)
    copies = Copies(monkeypatch)
    found = VisionBatch.build(grids, 56, table_side=5, order="raster")
    assert len(copies.copied) == 1 and copies.all_asynchronous()
    for name in FIELDS:
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert found.segments.lengths == expected.segments.lengths and found.segments.max_seqlen == expected.segments.max_seqlen
    assert torch.equal(found.segments.cu_seqlens, expected.segments.cu_seqlens)
    assert torch.equal(found.segments.schedule(16, False), schedule)
    Segments.from_lengths([3, 5], CPU)
    assert len(copies.copied) == 3 and copies.all_asynchronous()


def test_pinned_memory_is_for_a_real_gpu_only(monkeypatch):
    uses = host_copy._uses_pinned_memory
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert uses(gpu) and uses(torch.device("cuda:1"))
    assert not uses(CPU) and not uses(torch.device("meta"))
    with FakeTensorMode():
        assert not uses(gpu)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not uses(gpu)
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # The error is that of torch
    assert not uses(gpu)


def test_without_a_gpu_nothing_is_copied(monkeypatch):
    monkeypatch.setattr(host_copy, "_empty_pinned", lambda *_: pytest.fail("allocated pinned memory"))
    tensor = torch.rand(3)
    assert copy_to_device(tensor, CPU) is tensor
    assert copy_all_to_device([tensor], CPU)[0] is tensor


def test_static_tensors_are_overwritten_where_they_are():
    static = StaticTensors([((2, 5), torch.int32), ((5, 4), torch.float32), ((5,), torch.int64)], CPU)
    views = [view.data_ptr() for view in static.views]
    for count in (3, 5, 2, 0):
        tensors = [torch.full((2, count), 7, dtype=torch.int32), torch.rand(count, 4), torch.arange(1, count + 1)]
        static.overwrite(tensors)
        for view, tensor in zip(static.views, tensors, strict=True):
            found = view[tuple(slice(size) for size in tensor.shape)]
            assert torch.equal(found, tensor) and view.count_nonzero() == tensor.count_nonzero()
    assert [view.data_ptr() for view in static.views] == views


def test_static_tensors_are_overwritten_by_one_asynchronous_copy(monkeypatch):
    static = StaticTensors([((3,), torch.int64), ((2,), torch.float32)], CPU)
    copies, made = Copies(monkeypatch), []
    copy = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda x, y, non_blocking=False: made.append((x, y, non_blocking)) or copy(x, y))
    tensors = [torch.arange(3), torch.rand(2)]
    static.overwrite(tensors)
    copied = [(x, y, non_blocking) for x, y, non_blocking in made if x is static.buffer]
    assert len(copied) == 1 and copied[0][1] is copies.pinned[0] and copied[0][2]
    assert all(torch.equal(view, tensor) for view, tensor in zip(static.views, tensors, strict=True))
