"""The projector's kernels in the interpreter: against the reference, the golden data, and the memory traffic they may cause."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import keye_kernels as kk
from keye_kernels.reference.patch_merge import patch_merge_projection as reference
from keye_kernels.tools.bench.traffic import count_traffic, tensor_bytes
from keye_kernels.triton import linear as linear_module
from keye_kernels.triton.patch_merge import patch_merge_projection
from keye_kernels.triton.patch_merge_norm import patch_merge_norm
from tests.helpers.golden import load_projector_case

CHANNELS, HIDDEN, OUT = 64, 128, 96
GRIDS = [(1, 4, 6), (1, 2, 2), (2, 6, 4)]
FP32 = {"atol": 1e-5, "rtol": 1e-5}
BACKENDS = pytest.mark.parametrize("backend", ["triton", "torch"])
NORM_WIDTHS = pytest.mark.parametrize("norm_width", [CHANNELS, 4 * CHANNELS], ids=["norm-before", "norm-after"])


def merge_index(grids):
    """[T/4, 4] int32: the patches of each 2x2 block of features in raster order, image by image."""
    blocks, first = [], 0
    for t, h, w in grids:
        patches = torch.arange(first, first + t * h * w).view(t, h // 2, 2, w // 2, 2)
        blocks.append(patches.permute(0, 1, 3, 2, 4).reshape(-1, 4))
        first += t * h * w
    return torch.cat(blocks).int()


def make_weights(norm_width=CHANNELS, channels=CHANNELS, hidden=HIDDEN, out=OUT, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    width = 4 * channels
    weights = [1 + 0.3 * normal(norm_width), 0.3 * normal(norm_width)]
    weights += [normal(hidden, width) * width**-0.5, 0.3 * normal(hidden)]
    weights += [normal(out, hidden) * hidden**-0.5, 0.3 * normal(out)]
    return [weight.to(dtype) for weight in weights]


def make_features(num_patches, channels=CHANNELS, dtype=torch.float32, seed=0):
    return torch.randn(num_patches, channels, generator=torch.Generator().manual_seed(seed)).to(dtype)


def expected(features, index, weights, **options):
    return reference(features.double(), index, *(weight.double() for weight in weights), **options)


@pytest.mark.parametrize("order", ["raster", "block"])
@NORM_WIDTHS
@BACKENDS
def test_matches_reference(poisoned_empty, backend, norm_width, order):
    index = merge_index(GRIDS) if order == "raster" else None
    features, weights = make_features(76), make_weights(norm_width)
    out = patch_merge_projection(features, index, *weights, backend=backend)
    torch.testing.assert_close(out.double(), expected(features, index, weights), **FP32)


@pytest.mark.parametrize("num_patches", [4, 252, 260], ids=lambda n: f"T{n}")
def test_numbers_of_rows_around_a_block_match(poisoned_empty, num_patches):
    features, weights = make_features(num_patches), make_weights()
    out = patch_merge_projection(features, None, *weights, backend="triton")
    torch.testing.assert_close(out.double(), expected(features, None, weights), **FP32)


@BACKENDS
def test_no_patches_give_no_rows(backend):
    assert patch_merge_projection(make_features(0), None, *make_weights(), backend=backend).shape == (0, OUT)


@pytest.mark.parametrize("channels", [6, 20, 24, 48, 80], ids=lambda c: f"C{c}")
def test_any_number_of_channels_matches(poisoned_empty, channels):
    features, weights = make_features(24, channels), make_weights(channels, channels, hidden=72)
    index = merge_index([(1, 4, 6)])
    out = patch_merge_projection(features, index, *weights, backend="triton")
    torch.testing.assert_close(out.double(), expected(features, index, weights), **FP32)


def test_blocks_of_four_by_four_match(poisoned_empty):
    features, weights = make_features(32, channels=16), make_weights(norm_width=16)
    out = patch_merge_projection(features, None, *weights, merge_size=4, backend="triton")
    torch.testing.assert_close(out.double(), expected(features, None, weights, merge_size=4), **FP32)


def test_rows_of_a_wider_buffer_are_read_without_a_copy():
    buffer = make_features(24, 2 * CHANNELS)
    features, weights = buffer[:, CHANNELS:], make_weights()
    with count_traffic() as traffic:
        out = patch_merge_projection(features, None, *weights, backend="triton")
    assert not traffic.eager_operators
    assert torch.equal(out, patch_merge_projection(features.contiguous(), None, *weights, backend="triton"))


@BACKENDS
@NORM_WIDTHS
def test_fp16_error_is_like_that_of_eager_fp16(poisoned_empty, backend, norm_width):
    index, dtype = merge_index(GRIDS), torch.float16
    features, weights = make_features(76, dtype=dtype), make_weights(norm_width, dtype=dtype)
    exact = expected(features, index, weights)
    eager_error = (reference(features, index, *weights).double() - exact).abs().max()
    allowed = 2 * (eager_error + torch.finfo(dtype).eps * exact.abs().max())
    out = patch_merge_projection(features, index, *weights, backend=backend)
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() <= allowed


@BACKENDS
def test_fp16_features_with_float32_weights(backend):
    features, weights = make_features(24, dtype=torch.float16), make_weights()
    out = patch_merge_projection(features, None, *weights, backend=backend)
    exact = expected(features, None, weights)
    # Rounded weights and one rounding each of the normalized rows, the hidden rows and the output: four eps of the largest value
    assert out.dtype == torch.float16
    assert (out.double() - exact).abs().max() <= 4 * torch.finfo(torch.float16).eps * exact.abs().max()


@NORM_WIDTHS
def test_rows_with_a_large_mean_are_normalized_like_eager(norm_width):
    features, weights = make_features(24) + 1000, make_weights(norm_width)
    features[5:9] *= -1
    exact = expected(features, None, weights)
    eager_error = (reference(features, None, *weights).double() - exact).abs().max()
    out = patch_merge_projection(features, None, *weights, backend="triton")
    # The mean of numbers near 1000 has an error of its own: half a float32 step is 3e-5 of their deviation
    assert (out.double() - exact).abs().max() <= max(2 * eager_error, 1e-4)


@NORM_WIDTHS
def test_rows_without_variance_match(norm_width):
    features, weights = make_features(24), make_weights(norm_width)
    features[4:12] = 3.0
    features[13] = 0.0
    out = patch_merge_projection(features, None, *weights, backend="triton")
    torch.testing.assert_close(out.double(), expected(features, None, weights), **FP32)


@NORM_WIDTHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_merged_rows_match_layer_norm(poisoned_empty, norm_width, dtype):
    index = merge_index(GRIDS)
    features, (weight, bias, *_) = make_features(76, dtype=dtype), make_weights(norm_width, dtype=dtype)
    parts = features.double()[index.flatten()].view(-1, norm_width)
    exact = F.layer_norm(parts, (norm_width,), weight.double(), bias.double()).view(19, -1)
    out = patch_merge_norm(features, index, weight, bias)
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert out.shape == (19, 4 * CHANNELS) and out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5 + rounding)


@BACKENDS
def test_other_images_change_no_bit(backend):
    index, weights = merge_index(GRIDS), make_weights()
    features = make_features(76)
    before = patch_merge_projection(features, index, *weights, backend=backend)
    changed = features.clone()
    changed[24:28] = make_features(4, seed=7)
    after = patch_merge_projection(changed, index, *weights, backend=backend)
    assert torch.equal(after[:6], before[:6]) and torch.equal(after[7:], before[7:])
    assert not torch.equal(after[6], before[6])


def test_order_of_images_changes_no_bit(monkeypatch):
    # The interpreter uses BLAS, which adds up rows in different orders; tensor cores use one order
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype: np.einsum("mk,kn->mn", a, b, dtype=dtype))
    weights, images = make_weights(), make_features(76).split([24, 4, 48])
    together = patch_merge_projection(torch.cat(images), merge_index(GRIDS), *weights, backend="triton")
    out, order = together.split([6, 1, 12]), [2, 0, 1]
    moved = torch.cat([images[i] for i in order])
    moved_out = patch_merge_projection(moved, merge_index([GRIDS[i] for i in order]), *weights, backend="triton")
    assert torch.equal(moved_out, torch.cat([out[i] for i in order]))


@BACKENDS
def test_inputs_are_not_modified(backend):
    arguments = [make_features(76), merge_index(GRIDS), *make_weights()]
    copies = [argument.clone() for argument in arguments]
    patch_merge_projection(*arguments, backend=backend)
    assert all(torch.equal(argument, copy) for argument, copy in zip(arguments, copies, strict=True))


@BACKENDS
def test_golden_tiny_projector(poisoned_empty, backend):
    features, grid_thw, weights, exact = load_projector_case("tiny")
    out = patch_merge_projection(features, merge_index(grid_thw.tolist()), *weights, backend=backend)
    assert (out.double() - exact).abs().max() <= 2e-6


def test_golden_real_projector(monkeypatch, poisoned_empty):
    features, grid_thw, weights, exact = load_projector_case("real")
    # Few large steps: the time of the interpreter depends on their number
    blocks = {"BLOCK_M": 16, "BLOCK_N": 512, "BLOCK_K": 128}
    monkeypatch.setattr(linear_module, "launch_config", lambda kernel, device, key, heuristic: heuristic | blocks)
    linear_module._config.cache_clear()
    out = patch_merge_projection(features, merge_index(grid_thw.tolist()), *weights, backend="triton")
    linear_module._config.cache_clear()
    assert (out.double() - exact).abs().max() <= 3e-5


@pytest.mark.parametrize("order", ["raster", "block"])
def test_each_intermediate_is_written_and_read_once(order):
    channels, hidden, out = 64, 256, 224
    features = make_features(1536, channels, torch.float16)
    weights = make_weights(channels, channels, hidden, out, torch.float16)
    index = merge_index([(1, 8, 12)] * 16) if order == "raster" else None
    with count_traffic() as traffic:
        patch_merge_projection(features, index, *weights, backend="triton")
    names = [launch.kernel for launch in traffic.launches]
    assert names == ["patch_merge_norm_kernel", "linear_kernel", "linear_kernel"] and not traffic.eager_operators
    assert traffic.idle_programs == 0
    # Every input is read once, the output is written once, the merged rows and the hidden rows are written and read once
    rows = 1536 // 4
    floor = tensor_bytes(features, *weights) + rows * (2 * 4 * channels + 2 * hidden + out) * features.element_size()
    assert traffic.unique <= 1.05 * floor


def test_backend_torch_launches_the_norm_kernel_only():
    features, weights = make_features(32), make_weights()
    with count_traffic() as traffic:
        patch_merge_projection(features, None, *weights, backend="torch")
    assert [launch.kernel for launch in traffic.launches] == ["patch_merge_norm_kernel"]


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_auto_runs_the_backend_of_the_launch_configs(monkeypatch, backend):
    features, weights = make_features(32), make_weights()
    monkeypatch.setattr(linear_module, "launch_config", lambda *key: key[-1] | {"backend": backend})
    linear_module._config.cache_clear()
    with count_traffic() as traffic:
        out = patch_merge_projection(features, None, *weights)
    linear_module._config.cache_clear()
    assert len(traffic.launches) == (3 if backend == "triton" else 1)
    torch.testing.assert_close(out.double(), expected(features, None, weights), **FP32)


@pytest.mark.parametrize(("backend", "other", "launches"), [("triton", "torch", 3), ("torch", "triton", 1)])
def test_a_named_backend_runs_both_matmuls(monkeypatch, backend, other, launches):
    monkeypatch.setattr(linear_module, "launch_config", lambda *key: key[-1] | {"backend": other})
    linear_module._config.cache_clear()
    with count_traffic() as traffic:
        patch_merge_projection(make_features(32), None, *make_weights(), backend=backend)
    linear_module._config.cache_clear()
    assert len(traffic.launches) == launches


@BACKENDS
def test_the_gelu_is_exact(backend):
    features, weights = make_features(24), make_weights()
    normed = F.layer_norm(features, (CHANNELS,), weights[0], weights[1]).view(-1, 4 * CHANNELS)
    hidden = F.linear(normed, weights[2], weights[3])
    tanh = F.linear(F.gelu(hidden, approximate="tanh"), weights[4], weights[5])
    out = patch_merge_projection(features, None, *weights, backend=backend)
    assert (out - tanh).abs().max() > 1e-5


@BACKENDS
def test_weights_may_be_strided(backend):
    features, weights, grid = make_features(24), make_weights(), torch.tensor([[1, 4, 6]])
    contiguous = kk.ops.patch_merge_projection(features, grid, *weights, impl="reference")
    strided = [torch.stack((w, w), dim=-1)[..., 0] if w.ndim == 1 else w.t().contiguous().t() for w in weights]
    assert not any(w.is_contiguous() for w in strided)
    found = kk.ops.patch_merge_projection(features, grid, *strided, impl=backend)
    torch.testing.assert_close(found, contiguous, **FP32)
