"""Every tensor of a `VisionBatch`, against loops over patches in Python, and the corners against `F.interpolate`."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import keye_kernels as kk
from keye_kernels.geometry import VisionBatch, check_grid_thw
from keye_kernels.ops.vision_batch import build_vision_batch

GRIDS = [(1, 4, 6), (3, 2, 4), (1, 8, 2), (2, 6, 6)]
NUM_PATCHES = sum(t * h * w for t, h, w in GRIDS)
CPU = torch.device("cpu")
ORDERS = pytest.mark.parametrize("order", ["block", "raster"])
MERGE_SIZES = pytest.mark.parametrize("merge_size", [1, 2])


def patches(order, merge_size, grids=GRIDS):
    """(grid, row, column, raster index) of each patch in the order of the batch."""
    found, first = [], 0
    for grid in grids:
        t, h, w = grid
        steps = range(0, h, merge_size), range(0, w, merge_size)
        blocks = [
            (y + dy, x + dx) for y, x in itertools.product(*steps) for dy, dx in itertools.product(range(merge_size), repeat=2)
        ]
        places = blocks if order == "block" else list(itertools.product(range(h), range(w)))
        for frame in range(t):
            found += [(grid, row, column, first + frame * h * w + row * w + column) for row, column in places]
        first += t * h * w
    return found


def build(order="block", merge_size=2, table_side=5, **options):
    return VisionBatch.build(
        torch.tensor(GRIDS), NUM_PATCHES, table_side=table_side, merge_size=merge_size, order=order, **options
    )


@ORDERS
@MERGE_SIZES
def test_positions_and_raster_indices(order, merge_size):
    batch, expected = build(order, merge_size), patches(order, merge_size)
    assert batch.position_ids.tolist() == [[row for _, row, _, _ in expected], [column for _, _, column, _ in expected]]
    assert batch.raster_index.tolist() == [index for *_, index in expected]
    assert (batch.position_ids.dtype, batch.raster_index.dtype) == (torch.int32, torch.int64)
    assert (batch.table_side, batch.merge_size) == (5, merge_size)


@MERGE_SIZES
def test_merged_rows_join_the_patches_of_a_block(merge_size):
    batch = build("raster", merge_size)
    indices = [index for *_, index in patches("block", merge_size)]
    assert batch.merge_index.tolist() == [list(row) for row in zip(*[iter(indices)] * merge_size**2, strict=True)]
    assert batch.merge_index.dtype == torch.int32 and build("block", merge_size).merge_index is None


@ORDERS
@pytest.mark.parametrize("table_side", [1, 2, 5, 27])
def test_corners_interpolate_the_table(order, table_side):
    """Of any table, also where a side has fewer or more cells than the table, and at its edges."""
    table = torch.randn(table_side**2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    square = table.T.reshape(1, 3, table_side, table_side)
    resized = {(h, w): F.interpolate(square, size=(h, w), mode="bilinear", align_corners=False)[0] for _, h, w in GRIDS}
    expected = torch.stack([resized[h, w][:, row, column] for (_, h, w), row, column, _ in patches(order, 2)])
    batch = build(order, table_side=table_side)
    index, weight = batch.corner_index, batch.corner_weight
    assert (index.dtype, weight.dtype) == (torch.int32, torch.float32)
    assert index.min() >= 0 and index.max() < table_side**2 and weight.min() >= 0
    found = (table[index] * weight[..., None].double()).sum(1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(weight.sum(1), torch.ones(NUM_PATCHES))


@ORDERS
@pytest.mark.parametrize("by_frame", [False, True])
@pytest.mark.parametrize("merge_size", [2, 1])
def test_a_compiled_graph_builds_the_same_batch(order, by_frame, merge_size):
    sizes = {"table_side": 5, "merge_size": merge_size, "segment_by_frame": by_frame, "order": order, "device": CPU}
    expected = VisionBatch.build(torch.tensor(GRIDS), NUM_PATCHES, **sizes)
    eager = build_vision_batch(torch.tensor(GRIDS), NUM_PATCHES, **sizes)
    torch._dynamo.reset()
    compiled = torch.compile(lambda grid: build_vision_batch(grid, NUM_PATCHES, **sizes), fullgraph=True, backend="eager")
    found = compiled(torch.tensor(GRIDS))
    for batch in (eager, found):
        for name in ("position_ids", "corner_index", "corner_weight", "raster_index"):
            assert torch.equal(getattr(batch, name), getattr(expected, name)), name
        assert (batch.table_side, batch.merge_size) == (5, merge_size)
        if order == "raster":
            assert torch.equal(batch.merge_index, expected.merge_index)
        else:
            assert batch.merge_index is None
    assert eager.segments.lengths == expected.segments.lengths
    # Empty segments pad the offsets; T is an upper bound of the longest segment
    offsets = expected.segments.cu_seqlens.tolist()
    assert found.segments.cu_seqlens.tolist()[: len(offsets)] == offsets
    padding = found.segments.cu_seqlens.tolist()[len(offsets) :]
    assert set(padding) <= {NUM_PATCHES} and (by_frame or not padding)
    assert found.segments.max_seqlen == NUM_PATCHES and found.segments.lengths is None


@pytest.mark.parametrize("merge_size", [1, 2])
@pytest.mark.parametrize("by_frame", [False, True])
def test_the_fake_operator_has_the_shapes_and_dtypes_of_the_real_one(by_frame, merge_size):
    arguments = torch.tensor(GRIDS), NUM_PATCHES, 5, merge_size, by_frame, False, CPU
    torch.library.opcheck(
        torch.ops.keye_kernels.vision_geometry.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


@ORDERS
def test_a_batch_without_images(order):
    batch = VisionBatch.build(torch.zeros(0, 3, dtype=torch.int64), 0, table_side=5, order=order)
    assert batch.position_ids.shape == (2, 0) and batch.corner_index.shape == batch.corner_weight.shape == (0, 4)
    assert batch.segments.cu_seqlens.tolist() == [0] and batch.raster_index.shape == (0,)
    assert order == "block" or batch.merge_index.shape == (0, 4)


def test_a_batch_is_on_its_device():
    grid = torch.tensor(GRIDS)
    assert build().segments.cu_seqlens.device == CPU
    batch = VisionBatch.build(grid, NUM_PATCHES, table_side=5, order="raster", device=torch.device("meta"))
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert {x.device.type for x in (*tensors, batch.segments.cu_seqlens)} == {"meta"} and len(tensors) == 5
    assert batch.segments.schedule(16, False).device.type == "meta"


@pytest.mark.parametrize("grid", [(0, 4, 4), (1, 0, 4), (1, 4, 0), (-1, -4, 4), (1, 3, 4), (1, 4, 3)], ids=str)
def test_grids_that_are_empty_or_not_divisible_are_refused(grid):
    with pytest.raises(ValueError, match="grid_thw must hold positive sizes with rows and columns divisible by 2"):
        check_grid_thw(torch.tensor([(1, 2, 2), grid]), None, 2)


def test_grids_of_another_number_of_patches_are_refused():
    grid = torch.tensor([(2, 2, 2), (1, 4, 2)])
    assert check_grid_thw(grid, 16, 2) == check_grid_thw(grid.int(), None, 2) == [(2, 2, 2), (1, 4, 2)]
    assert check_grid_thw(torch.tensor([(1, 1, 1)]), 1, 1) == [(1, 1, 1)]
    for patches_given in (0, 12, 17):
        with pytest.raises(ValueError, match=f"grid_thw describes 16 patches, but {patches_given} patches were given"):
            check_grid_thw(grid, patches_given, 2)
    for wrong in (grid[:, :2], grid[0]):
        with pytest.raises(ValueError, match=r"grid_thw must be integer \[n, 3\]"):
            check_grid_thw(wrong, None, 2)


@pytest.mark.parametrize("merge_size", [1, 2, 4])
def test_the_projector_merges_blocks_of_any_size(merge_size):
    """Features that name their patch and weights that copy: each merged row holds its block, row by row."""
    grids = [(2, 4, 8), (1, 8, 4)]
    count, width = 96, merge_size**2 * 2
    features = torch.stack((torch.arange(count), -torch.arange(count)), dim=1).double()
    copy, zeros = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    norm = torch.ones(width, dtype=torch.float64), zeros
    out = kk.ops.patch_merge_projection(features, torch.tensor(grids), *norm, copy, zeros, copy, zeros, merge_size=merge_size)
    blocks = torch.tensor([index for *_, index in patches("block", merge_size, grids)]).view(-1, merge_size**2)
    expected = F.gelu(F.layer_norm(features[blocks].flatten(1), (width,)))
    torch.testing.assert_close(out, expected)
    batch = VisionBatch.build(torch.tensor(grids), count, table_side=3, merge_size=merge_size)
    again = kk.ops.patch_merge_projection(
        features[batch.raster_index], batch, *norm, copy, zeros, copy, zeros, merge_size=merge_size
    )
    torch.testing.assert_close(again, expected)
