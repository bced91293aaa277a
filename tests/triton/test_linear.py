"""The linear kernel in the interpreter: any shape, bias, exact GELU, backends, and the order of its sums."""

import pytest
import torch
import torch.nn.functional as F

from keye_kernels.tools.bench.traffic import count_traffic, tensor_bytes
from keye_kernels.triton import linear as module
from keye_kernels.triton.device import MULTIPROCESSORS, Arch
from keye_kernels.triton.linear import heuristic, launch_options, linear

# Small, so that the interpreter runs several programs and several steps of K
SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2, "use_tma": False}
CONFIG = SMALL | {"backend": "triton"}
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])


def inputs(rows, width, columns, dtype):
    """x [rows, width], weight [columns, width] and bias [columns]."""
    generator = torch.Generator().manual_seed(rows + width + columns)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((rows, width), (columns, width), (columns,)))
    return x.to(dtype), (weight * width**-0.5).to(dtype), bias.to(dtype)


def exact(x, weight, bias, gelu=False):
    out = F.linear(x.double(), weight.double(), bias.double())
    return F.gelu(out) if gelu else out


def allowed_error(dtype, exact):
    # Sums are in float32. The torch backend rounds before its GELU, then once more
    return 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps * exact.abs().max()


@DTYPES
@pytest.mark.parametrize("width", [1, 3, 8, 15, 17, 24, 33, 72, 100, 131, 144], ids=lambda width: f"IN{width}")
def test_any_number_of_input_features(poisoned_empty, width, dtype):
    x, weight, bias = inputs(20, width, 40, dtype)
    out, expected = linear(x, weight, bias, backend="triton", config=CONFIG), exact(x, weight, bias)
    assert out.dtype == dtype and (out.double() - expected).abs().max() <= allowed_error(dtype, expected)


@pytest.mark.parametrize("width", [17, 24, 100])
def test_nothing_past_the_last_row_is_used(width):
    x, weight, bias = inputs(20, width, 40, torch.float32)
    # Each tensor is followed by NaN, which an unmasked load of the last row would read
    guarded = []
    for tensor in (x, weight):
        buffer = torch.full((tensor.numel() + 64,), torch.nan)
        guarded.append(buffer[: tensor.numel()].view(tensor.shape).copy_(tensor))
    out = linear(*guarded, bias, backend="triton", config=CONFIG)
    assert torch.equal(out, linear(x, weight, bias, backend="triton", config=CONFIG)) and out.isfinite().all()


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("rows", [1, 70])
@DTYPES
def test_the_epilogue_is_the_exact_gelu(poisoned_empty, dtype, rows, backend):
    # 100 columns end in the first half of the second block of columns, 20 in the first half of the first
    for columns in (100, 20):
        x, weight, bias = inputs(rows, 144, columns, dtype)
        config = CONFIG | {"BLOCK_M": 64, "BLOCK_N": 64}
        expected = exact(x, weight, bias, gelu=True)
        out = linear(x, weight, bias, True, backend, config)
        allowed = allowed_error(dtype, exact(x, weight, bias))
        assert out.dtype == dtype and (out.double() - expected).abs().max() <= allowed
        if dtype == torch.float32 and rows > 1:
            tanh = F.gelu(exact(x, weight, bias), approximate="tanh")
            assert (out.double() - tanh).abs().max() > 1e-4
        plain = linear(x, weight, bias, False, backend, config)
        assert (plain.double() - exact(x, weight, bias)).abs().max() <= allowed


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_weights_are_rounded_to_the_dtype_of_x(backend):
    x, weight, bias = inputs(20, 48, 40, torch.float32)
    out = linear(x.half(), weight, bias, backend=backend, config=CONFIG)
    rounded = exact(x.half(), weight.half(), bias)
    assert out.dtype == torch.float16
    assert (out.double() - rounded).abs().max() <= 2 * torch.finfo(torch.float16).eps * rounded.abs().max()


def test_auto_runs_the_backend_of_the_launch_config(monkeypatch):
    x, weight, bias = inputs(20, 48, 40, torch.float32)
    for backend, launches in (("triton", 1), ("torch", 0)):
        monkeypatch.setattr(module, "launch_config", lambda *_, backend=backend: CONFIG | {"backend": backend})
        module._config.cache_clear()
        with count_traffic() as traffic:
            linear(x, weight, bias)
        assert len(traffic.launches) == launches
    module._config.cache_clear()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_named_backend_overrides_the_launch_config(backend):
    x, weight, bias = inputs(20, 48, 40, torch.float32)
    other = {"triton": "torch", "torch": "triton"}[backend]
    with count_traffic() as traffic:
        linear(x, weight, bias, backend=backend, config=CONFIG | {"backend": other})
    assert len(traffic.launches) == (backend == "triton")


def test_groups_of_row_blocks_cover_every_output_once(poisoned_empty):
    # 11 blocks of 16 rows: one whole group of 8 and a partial one
    x, weight, bias = inputs(170, 32, 90, torch.float16)
    with count_traffic() as traffic:
        out = linear(x, weight, bias, backend="triton", config=CONFIG)
    (launch,) = traffic.launches
    assert launch.programs == 11 * 3 and not launch.idle_programs and launch.stored == out.nbytes
    assert launch.loaded_once == tensor_bytes(x, weight, bias)
    assert (out.double() - exact(x, weight, bias)).abs().max() <= allowed_error(torch.float16, exact(x, weight, bias))


@pytest.mark.parametrize(
    ("width", "block_k"), [(4608, 64), (144, 16), (96, 32), (24, 64), (1001, 64)], ids=lambda value: str(value)
)
def test_block_k_divides_the_width_where_tl_dot_allows(width, block_k):
    assert launch_options(CONFIG | {"BLOCK_K": 64}, width)["BLOCK_K"] == block_k


@pytest.mark.parametrize("name", MULTIPROCESSORS)
def test_the_heuristic_runs_the_matmuls_of_torch(name):
    for rows in (16, 256, 4096):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert heuristic(Arch(name), rows, 4608, dtype)["backend"] == "torch"


def test_the_heuristic_uses_smaller_blocks_for_few_rows():
    sizes = [heuristic(Arch("sm_90"), rows, 4608, torch.bfloat16)["BLOCK_M"] for rows in (16, 256, 1024, 4096)]
    assert sizes == sorted(sizes) and sizes[0] == 64 and sizes[-1] == 128
