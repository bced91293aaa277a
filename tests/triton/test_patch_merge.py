"""The projector's kernels in the interpreter: against the reference, the official numbers, and the bytes they may move."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import keye_kernels as kk
from keye_kernels.reference.patch_merge import patch_merge_projection as reference
from keye_kernels.tools.bench.traffic import count_traffic, tensor_bytes
from keye_kernels.triton import matmul, patch_merge
from keye_kernels.triton.patch_merge import patch_merge_projection
from tests.helpers.golden import load_projector_case

CHANNELS, HIDDEN, OUT = 64, 128, 96
GRIDS = [(1, 4, 6), (1, 2, 2), (2, 6, 4)]
FP32 = {"atol": 1e-5, "rtol": 1e-5}
PATHS = {
    "fused": {"path": "triton", "statistics": "fused", "tiles_per_program": 2, "BLOCK_N": 32},
    "separate": {"path": "triton", "statistics": "separate", "tiles_per_program": 1, "BLOCK_N": 64},
    "merged": {"path": "merged", "BLOCK_N": 32},
    "cublas": {"path": "cublas"},
}


@pytest.fixture
def use_tile(monkeypatch):
    """Sets fields of the tile, as a measured table would."""

    def use(**fields):
        monkeypatch.setattr(patch_merge, "tile", lambda kernel, device, key, heuristic: heuristic | fields)

    return use


def merge_index(grids, dtype=torch.int32):
    """The rows that each 2x2 block joins, in raster order of blocks, images one after another."""
    blocks, first = [], 0
    for t, h, w in grids:
        patches = torch.arange(first, first + t * h * w).view(t, h // 2, 2, w // 2, 2)
        blocks.append(patches.permute(0, 1, 3, 2, 4).reshape(-1, 4))
        first += t * h * w
    return torch.cat(blocks).to(dtype)


def make_weights(norm_width=CHANNELS, channels=CHANNELS, hidden=HIDDEN, out=OUT, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    width = 4 * channels
    weights = [1 + 0.3 * normal(norm_width), 0.3 * normal(norm_width)]
    weights += [normal(hidden, width) * width**-0.5, 0.3 * normal(hidden)]
    weights += [normal(out, hidden) * hidden**-0.5, 0.3 * normal(out)]
    return [weight.to(dtype) for weight in weights]


def make_features(num_patches, channels=CHANNELS, dtype=torch.float32, seed=0):
    return torch.randn(num_patches, channels, generator=torch.Generator().manual_seed(seed)).to(dtype)


def expected(features, index, weights):
    return reference(features.double(), index, *(weight.double() for weight in weights))


@pytest.mark.parametrize("order", ["raster", "block"])
@pytest.mark.parametrize("norm_width", [CHANNELS, 4 * CHANNELS], ids=["norm-before", "norm-after"])
@pytest.mark.parametrize("path", PATHS)
def test_matches_reference(use_tile, poisoned_empty, path, norm_width, order):
    use_tile(**PATHS[path])
    index = merge_index(GRIDS) if order == "raster" else None
    features, weights = make_features(76), make_weights(norm_width)
    out = patch_merge_projection(features, index, *weights)
    torch.testing.assert_close(out.double(), expected(features, index, weights), **FP32)


@pytest.mark.parametrize("num_patches", [4, 252, 260], ids=lambda n: f"T{n}")
def test_rows_at_the_edge_of_a_tile_match_reference(poisoned_empty, num_patches):
    features, weights = make_features(num_patches), make_weights()
    out = patch_merge_projection(features, None, *weights)
    torch.testing.assert_close(out.double(), expected(features, None, weights), **FP32)


def test_no_patches_give_no_rows():
    assert patch_merge_projection(make_features(0), None, *make_weights()).shape == (0, OUT)


def test_channels_too_odd_for_the_fused_product_go_to_torch(monkeypatch):
    monkeypatch.setattr(matmul, "linear_kernel", None)
    features, weights = make_features(24, 24), make_weights(24, 24)
    assert patch_merge_projection(features, None, *weights).shape == (6, OUT)


@pytest.mark.parametrize("channels", [24, 48, 80], ids=lambda c: f"C{c}")
def test_any_multiple_of_eight_channels_matches_reference(poisoned_empty, channels):
    features, weights = make_features(24, channels), make_weights(channels, channels, hidden=72)
    index = merge_index([(1, 4, 6)])
    out = patch_merge_projection(features, index, *weights)
    torch.testing.assert_close(out.double(), expected(features, index, weights), **FP32)


def test_blocks_of_four_by_four_match_reference(poisoned_empty):
    features, weights = make_features(32, channels=16), make_weights(norm_width=16)
    out = patch_merge_projection(features, None, *weights, merge_size=4)
    wanted = reference(features.double(), None, *(weight.double() for weight in weights), merge_size=4)
    torch.testing.assert_close(out.double(), wanted, **FP32)


@pytest.mark.parametrize("path", PATHS)
def test_rows_of_a_wider_buffer_are_read_in_place(use_tile, path):
    use_tile(**PATHS[path])
    buffer = make_features(24, 2 * CHANNELS)
    features, weights = buffer[:, CHANNELS:], make_weights()
    out = patch_merge_projection(features, None, *weights)
    assert torch.equal(out, patch_merge_projection(features.contiguous(), None, *weights))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("norm_width", [CHANNELS, 4 * CHANNELS], ids=["norm-before", "norm-after"])
def test_half_precision_errs_like_eager_half_precision(use_tile, poisoned_empty, path, norm_width):
    use_tile(**PATHS[path])
    index, dtype = merge_index(GRIDS), torch.float16
    features, weights = make_features(76, dtype=dtype), make_weights(norm_width, dtype=dtype)
    wanted = expected(features, index, weights)
    eager_error = (reference(features, index, *weights).double() - wanted).abs().max()
    allowed = 2 * (eager_error + torch.finfo(dtype).eps * wanted.abs().max())
    out = patch_merge_projection(features, index, *weights)
    assert out.dtype == dtype
    assert (out.double() - wanted).abs().max() <= allowed


@pytest.mark.parametrize("path", PATHS)
def test_half_precision_features_take_float32_weights(use_tile, path):
    use_tile(**PATHS[path])
    features, weights = make_features(24, dtype=torch.float16), make_weights()
    out = patch_merge_projection(features, None, *weights)
    wanted = expected(features, None, weights)
    # Rounded weights and one rounding of each of normed, hidden and out: four eps of the largest value.
    assert out.dtype == torch.float16
    assert (out.double() - wanted).abs().max() <= 4 * torch.finfo(torch.float16).eps * wanted.abs().max()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("norm_width", [CHANNELS, 4 * CHANNELS], ids=["norm-before", "norm-after"])
def test_rows_with_a_large_mean_are_normalised_like_eager(use_tile, path, norm_width):
    use_tile(**PATHS[path])
    features, weights = make_features(24) + 1000, make_weights(norm_width)
    features[5:9] *= -1
    wanted = expected(features, None, weights)
    eager_error = (reference(features, None, *weights).double() - wanted).abs().max()
    out = patch_merge_projection(features, None, *weights)
    # The mean of numbers near 1000 has an error of its own: half a float32 step is 3e-5 of their deviation.
    assert (out.double() - wanted).abs().max() <= max(2 * eager_error, 1e-4)


@pytest.mark.parametrize("norm_width", [CHANNELS, 4 * CHANNELS], ids=["norm-before", "norm-after"])
def test_rows_without_variance_match_reference(norm_width):
    features, weights = make_features(24), make_weights(norm_width)
    features[4:12] = 3.0
    features[13] = 0.0
    out = patch_merge_projection(features, None, *weights)
    torch.testing.assert_close(out.double(), expected(features, None, weights), **FP32)


@pytest.mark.parametrize("path", PATHS)
def test_other_images_do_not_touch_an_image(use_tile, path):
    use_tile(**PATHS[path])
    index, weights = merge_index(GRIDS), make_weights()
    features = make_features(76)
    before = patch_merge_projection(features, index, *weights)
    changed = features.clone()
    changed[24:28] = make_features(4, seed=7)
    after = patch_merge_projection(changed, index, *weights)
    assert torch.equal(after[:6], before[:6]) and torch.equal(after[7:], before[7:])
    assert not torch.equal(after[6], before[6])


@pytest.mark.parametrize("path", ["fused", "separate", "merged"])
def test_order_of_images_does_not_matter(monkeypatch, use_tile, path):
    # The interpreter multiplies by BLAS, which adds up a row in an order that depends on its place; tensor cores do not.
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype: np.einsum("mk,kn->mn", a, b, dtype=dtype))
    use_tile(**PATHS[path])
    weights, images = make_weights(), make_features(76).split([24, 4, 48])
    out = patch_merge_projection(torch.cat(images), merge_index(GRIDS), *weights).split([6, 1, 12])
    order = [2, 0, 1]
    moved = torch.cat([images[i] for i in order])
    moved_out = patch_merge_projection(moved, merge_index([GRIDS[i] for i in order]), *weights)
    assert torch.equal(moved_out, torch.cat([out[i] for i in order]))


def test_inputs_are_not_written():
    arguments = [make_features(76), merge_index(GRIDS), *make_weights()]
    copies = [argument.clone() for argument in arguments]
    patch_merge_projection(*arguments)
    assert all(torch.equal(argument, copy) for argument, copy in zip(arguments, copies, strict=True))


def test_golden_tiny_projector(use_tile, poisoned_empty):
    features, grid_thw, weights, expected = load_projector_case("tiny")
    out = patch_merge_projection(features, merge_index(grid_thw.tolist()), *weights)
    assert (out.double() - expected).abs().max() <= 2e-6


def test_golden_real_projector(monkeypatch, use_tile, poisoned_empty):
    features, grid_thw, weights, expected = load_projector_case("real")
    # A tile for the interpreter, whose time goes by steps.
    wide = {"BLOCK_M": 16, "BLOCK_N": 512, "BLOCK_K": 128}
    use_tile(**wide)
    monkeypatch.setattr("keye_kernels.triton.matmul.tile", lambda kernel, device, key, heuristic: heuristic | wide)
    out = patch_merge_projection(features, merge_index(grid_thw.tolist()), *weights)
    assert (out.double() - expected).abs().max() <= 3e-5


def practical_floor(features, weights):
    """Every input read and every output written once, and the hidden activation both written and read."""
    rows, hidden, out = features.shape[0] // 4, weights[2].shape[0], weights[4].shape[0]
    return tensor_bytes(features, *weights) + rows * (2 * hidden + out) * features.element_size()


@pytest.mark.parametrize("order", ["raster", "block"])
def test_sixteen_images_take_two_launches_and_one_practical_floor(order):
    channels, hidden, out = 64, 256, 224
    features = make_features(1536, channels, torch.float16)
    weights = make_weights(channels, channels, hidden, out, torch.float16)
    index = merge_index([(1, 8, 12)] * 16) if order == "raster" else None
    with count_traffic() as traffic:
        patch_merge_projection(features, index, *weights)
    floor = practical_floor(features, weights)
    assert len(traffic.launches) == 2 and not traffic.eager_operators
    assert traffic.idle_programs == 0
    assert traffic.unique <= 1.05 * floor


def test_few_rows_read_the_features_twice_and_stay_within_the_floor():
    features = make_features(32, CHANNELS, torch.float16)
    weights = make_weights(hidden=256, out=224, dtype=torch.float16)
    with count_traffic() as traffic:
        patch_merge_projection(features, None, *weights)
    assert [launch.kernel for launch in traffic.launches] == [
        "patch_merge_norm_kernel",
        "patch_merge_linear_kernel",
        "linear_kernel",
    ]
    assert traffic.idle_programs == 0
    assert traffic.unique <= 1.05 * practical_floor(features, weights)


def test_merged_rows_go_through_memory_once_and_into_two_plain_products(use_tile):
    use_tile(path="merged")
    features = make_features(32, CHANNELS, torch.float16)
    index, weights = merge_index([(1, 4, 8)]), make_weights(hidden=256, out=224, dtype=torch.float16)
    with count_traffic() as traffic:
        patch_merge_projection(features, index, *weights)
    names = [launch.kernel for launch in traffic.launches]
    assert names == ["patch_merge_norm_kernel", "linear_kernel", "linear_kernel"] and not traffic.eager_operators


def test_the_second_product_goes_to_torch_where_its_table_says_so(monkeypatch, poisoned_empty):
    features, weights = make_features(24), make_weights()
    monkeypatch.setattr(matmul, "tile", lambda kernel, device, key, heuristic: heuristic | {"path": "cublas"})
    monkeypatch.setattr(matmul, "linear_kernel", None)
    out = patch_merge_projection(features, None, *weights)
    torch.testing.assert_close(out.double(), expected(features, None, weights), **FP32)


@pytest.mark.parametrize("version", [(3, 6), (3, 10)], ids=["3.6", "3.10"])
def test_compilers_that_spill_the_widest_tile_get_a_narrower_one(monkeypatch, version):
    monkeypatch.setattr(patch_merge, "TRITON_VERSION", version)
    for arch, dtype in ((80, torch.bfloat16), (90, torch.float16), (0, torch.float16), (90, torch.float32)):
        config = patch_merge.heuristic(arch, 132, 4096, dtype, 4608, 4608, 4096, gathered=False)
        product = matmul.matmul_tile(arch, 132, 4096, 4608, dtype)
        narrow = arch and dtype != torch.float32 and version < (3, 7)
        path = {"path": "cublas" if arch == 90 and dtype != torch.float32 else "triton"}
        assert config == product | path | {"statistics": config["statistics"]} | ({"BLOCK_N": 128} if narrow else {})


@pytest.mark.parametrize("path", ["triton", "cublas"])
@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_a_product_ends_in_exact_gelu(poisoned_empty, dtype, rows, path):
    # 100 columns end within the second tile's first half, and 20 within the first's
    for columns in (100, 20):
        x, weight, bias = make_features(rows, 144, dtype), *make_weights(channels=36, hidden=columns, dtype=dtype)[2:4]
        config = matmul.matmul_tile(90, 132, rows, columns, torch.float16) | {"BLOCK_N": 64, "path": path}
        wanted = F.linear(x.double(), weight.double(), bias.double())
        out = matmul.linear(x, weight, bias, config, gelu=True)
        # Float32 sums; torch's product is rounded before its GELU, and the result once more
        allowed = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps * wanted.abs().max()
        assert out.dtype == dtype and (out.double() - F.gelu(wanted)).abs().max() <= allowed
        if dtype == torch.float32 and rows > 1:
            assert (out.double() - F.gelu(wanted, approximate="tanh")).abs().max() > 1e-4
        plain = matmul.linear(x, weight, bias, config)
        assert (plain.double() - wanted).abs().max() <= allowed


@pytest.mark.parametrize("path", PATHS)
def test_exact_gelu_not_its_tanh_approximation(use_tile, path):
    use_tile(**PATHS[path])
    features, weights = make_features(24), make_weights()
    normed = F.layer_norm(features, (CHANNELS,), weights[0], weights[1]).view(-1, 4 * CHANNELS)
    hidden = F.linear(normed, weights[2], weights[3])
    tanh = F.linear(F.gelu(hidden, approximate="tanh"), weights[4], weights[5])
    out = patch_merge_projection(features, None, *weights)
    assert (out - tanh).abs().max() > 1e-5


@pytest.mark.parametrize("path", PATHS)
def test_weights_may_lie_in_any_order(use_tile, path):
    use_tile(**PATHS[path])
    features, weights = make_features(24), make_weights()
    wanted = kk.ops.patch_merge_projection(features, torch.tensor([[1, 4, 6]]), *weights, impl="reference")
    spread = [torch.stack((w, w), dim=-1)[..., 0] if w.ndim == 1 else w.t().contiguous().t() for w in weights]
    assert not any(w.is_contiguous() for w in spread)
    found = kk.ops.patch_merge_projection(features, torch.tensor([[1, 4, 6]]), *spread, impl="triton")
    torch.testing.assert_close(found, wanted, **FP32)
