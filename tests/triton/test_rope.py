"""The rope kernel in the interpreter: cosine and sine, golden data, float64, exact properties, and memory traffic."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from keye_kernels import ops, reference
from keye_kernels.model.config import MAX_POSITION
from keye_kernels.tools.bench.traffic import count_traffic, tensor_bytes
from keye_kernels.triton.launch import Kernel
from keye_kernels.triton.rope import _cos_sin, rope
from tests.helpers.golden import load_golden

TEXT, VISION = [16, 24, 24], [18, 18]
FP32 = {"atol": 1e-5, "rtol": 1e-5}
# Tolerances of tests/golden/preview/README.md. The official code rounds every product to bfloat16
GOLDEN_FP32 = 2e-6
GOLDEN_MROPE_BF16 = 0.03
MAX_COS_SIN_ERROR = {131_072: 2e-6, 1_048_576: 1e-5}  # largest angle -> allowed error


def inverse_frequencies(count: int, theta: float) -> Tensor:
    return 1.0 / theta ** (torch.arange(count, dtype=torch.float32) / count)


def make(kind: str, tokens: int, dtype: torch.dtype, heads: tuple[int, int] = (4, 2)) -> dict:
    """Arguments of one call as in the text model (with norms) or in the vision tower. q and k are views of one buffer."""
    torch.manual_seed(tokens)
    head_dim, sections, inv_freq = {
        "text": (128, TEXT, inverse_frequencies(64, 1e6)),
        "vision": (72, VISION, inverse_frequencies(18, 1e4)),
    }[kind]
    fused = torch.randn(tokens, heads[0] + 2 * heads[1], head_dim).to(dtype)
    arguments = {
        "q": fused[:, : heads[0]],
        "k": fused[:, heads[0] : sum(heads)],
        "position_ids": torch.randint(0, 5000, (len(sections), tokens)),
        "inv_freq": inv_freq,
        "sections": sections,
    }
    if kind == "text":
        arguments |= {"q_norm_weight": torch.randn(128).to(dtype), "k_norm_weight": torch.randn(128).to(dtype)}
    return arguments


def exact(arguments: dict, **changes) -> tuple[Tensor, Tensor]:
    """The reference in float64."""
    arguments = arguments | changes
    return reference.rope(**arguments | {"q": arguments["q"].double(), "k": arguments["k"].double()})


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.finfo(dtype).eps * torch.exp2(x.abs().clamp(min=torch.finfo(dtype).tiny).log2().floor())


@triton.jit
def cos_sin_kernel(cos_ptr, sin_ptr, angle_ptr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    cos, sin = _cos_sin(tl.load(angle_ptr + at))
    tl.store(cos_ptr + at, cos)
    tl.store(sin_ptr + at, sin)


@pytest.mark.parametrize("fused", [True, False], ids=["fma", "separate"])
@pytest.mark.parametrize("largest", MAX_COS_SIN_ERROR)
def test_cos_sin_error_is_bounded(largest, fused, monkeypatch):
    def create_fma(self, x, y, z):
        product = x.data.astype("float64" if fused else "float32") * y.data
        return TensorHandle((product + z.data).astype("float32"), x.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", create_fma)
    torch.manual_seed(0)
    uniform = torch.rand(1 << 15, dtype=torch.float64)
    integers = torch.randint(0, largest + 1, (1 << 15,))
    near_zeros = (uniform * largest / torch.pi * 2).floor() * torch.pi / 2
    angle = torch.cat([uniform * largest, integers, near_zeros, largest * (1 - uniform * 1e-3)]).float()
    for angle in (angle, -angle):  # noqa: B020
        cos, sin = torch.empty_like(angle), torch.empty_like(angle)
        cos_sin_kernel[(1,)](cos, sin, angle, COUNT=angle.numel())
        assert (cos - angle.double().cos()).abs().max() <= MAX_COS_SIN_ERROR[largest]
        assert (sin - angle.double().sin()).abs().max() <= MAX_COS_SIN_ERROR[largest]


@pytest.mark.parametrize("largest", MAX_COS_SIN_ERROR)
def test_angles_are_float32_products_up_to_the_largest_positions(largest):
    torch.manual_seed(0)
    position_ids = largest - torch.randint(0, 1000, (1, 100))
    q = torch.cat([torch.ones(100, 1, 4), torch.zeros(100, 1, 4)], dim=2)  # rotating (1, 0) gives (cos, sin)
    inv_freq = torch.tensor([1.0, 0.7853, 0.31, 1e-3])
    cos_sin, _ = rope(q, q[:, :0], position_ids, inv_freq, [4])
    expected, _ = reference.rope(q.double(), q[:, :0].double(), position_ids, inv_freq, [4])
    assert (cos_sin - expected).abs().max() <= MAX_COS_SIN_ERROR[largest]


def test_rope_at_the_largest_position_of_the_model():
    q, k = torch.randn(512, 1, 8), torch.randn(512, 1, 8)
    positions = torch.arange(MAX_POSITION - 511, MAX_POSITION + 1).expand(2, -1).contiguous()
    arguments = q, k, positions, torch.tensor([1.0, 0.7]), [2, 2]
    options = None, None, 0.0, False
    for found, expected in zip(rope(*arguments, *options), reference.rope(*arguments, *options), strict=True):
        torch.testing.assert_close(found, expected, atol=3e-5, rtol=0)


def test_rope_matches_golden_mrope():
    data = load_golden("preview", "kernel_mrope.safetensors")
    for row in range(2):
        q, k = (data[name][row].transpose(0, 1) for name in "qk")  # [S, heads, 128] without a copy
        call = (data["position_ids"][:, row], data["inv_freq"], data["mrope_section"].tolist())
        for out, name in zip(rope(q, k, *call), "qk", strict=True):
            expected = data[f"{name}_out_f64"][row].transpose(0, 1)
            assert (out - expected).abs().max() <= GOLDEN_FP32
        # PyTorch rounds the float32 result: the interpreter truncates, a GPU rounds
        for out, name in zip(rope(q.bfloat16().float(), k.bfloat16().float(), *call), "qk", strict=True):
            expected = data[f"{name}_out_bf16"][row].transpose(0, 1)
            assert (out.bfloat16().float() - expected.float()).abs().max() <= GOLDEN_MROPE_BF16


def test_rope_matches_golden_vision_rope():
    data = load_golden("preview", "kernel_vision_rope.safetensors")
    q, k = data["q"], data["k"]
    call = (torch.stack([data["height_position_ids"], data["width_position_ids"]]), data["inv_freq"], VISION)
    for out, out_bf16, name in zip(rope(q, k, *call), rope(q.bfloat16(), k.bfloat16(), *call), "qk", strict=True):
        assert (out - data[f"{name}_out_f64"]).abs().max() <= GOLDEN_FP32
        expected = data[f"{name}_out_bf16"].double()
        # One ulp: the interpreter truncates, a GPU rounds
        assert ((out_bf16.double() - expected).abs() <= ulp(expected, torch.bfloat16)).all()


@pytest.mark.parametrize("tokens", [1, 63, 100, 257], ids=lambda tokens: f"T{tokens}")
@pytest.mark.parametrize("kind", ["text", "vision"])
def test_fp32_matches_float64(kind, tokens, poisoned_empty):
    arguments = make(kind, tokens, torch.float32)
    for out, expected in zip(rope(**arguments), exact(arguments), strict=True):
        torch.testing.assert_close(out.double(), expected, **FP32)


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_fp16_error_is_like_that_of_eager_fp16(kind, poisoned_empty):
    arguments = make(kind, 63, torch.float16)
    for out, eager, expected in zip(rope(**arguments), reference.rope(**arguments), exact(arguments), strict=True):
        allowed = 2 * ((eager - expected).abs().max() + torch.finfo(torch.float16).eps * expected.abs().max())
        assert (out - expected).abs().max() <= allowed


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_bf16_is_within_one_ulp(kind, poisoned_empty):
    arguments = make(kind, 63, torch.bfloat16)
    for out, expected in zip(rope(**arguments), exact(arguments), strict=True):
        # atol: the error of float32 arithmetic where the two products cancel
        allowed = ulp(expected, torch.bfloat16) + FP32["atol"]
        assert ((out.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("head_dim", [8, 40, 80, 88, 256], ids=lambda dim: f"D{dim}")
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_other_head_dims_match(head_dim, norm, poisoned_empty):
    torch.manual_seed(0)
    q, k, weight = torch.randn(5, 6, head_dim), torch.randn(5, 3, head_dim), torch.randn(head_dim) if norm else None
    half = head_dim // 2
    call = (
        torch.randint(0, 100, (2, 5)),
        inverse_frequencies(half, 1e4),
        [half // 4, half - half // 4],
        weight,
        weight,
    )
    for out, expected in zip(rope(q, k, *call), reference.rope(q.double(), k.double(), *call), strict=True):
        torch.testing.assert_close(out.double(), expected, **FP32)


def test_norm_of_q_alone_leaves_k_unscaled():
    arguments = make("text", 3, torch.float32) | {"k_norm_weight": None}
    for out, expected in zip(rope(**arguments), exact(arguments), strict=True):
        torch.testing.assert_close(out.double(), expected, **FP32)


def test_eps_keeps_heads_of_zeros_finite():
    arguments = make("text", 3, torch.float32) | {"eps": 1e-3}
    arguments["q"] = arguments["q"] * 0.01
    arguments["q"][1] = 0
    for out, expected in zip(rope(**arguments), exact(arguments), strict=True):
        torch.testing.assert_close(out.double(), expected, **FP32)


def test_q_k_and_weights_may_have_different_dtypes():
    arguments = make("text", 9, torch.float32)
    arguments["q"] = arguments["q"].half()
    q_out, k_out = rope(**arguments)
    assert (q_out.dtype, k_out.dtype) == (torch.float16, torch.float32)
    expected_q, expected_k = exact(arguments)
    assert ((q_out - expected_q).abs() <= ulp(expected_q, torch.float16) + FP32["atol"]).all()
    torch.testing.assert_close(k_out.double(), expected_k, **FP32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("kind", ["text", "vision"])
def test_position_0_is_the_identity(kind, dtype):
    arguments = make(kind, 5, dtype) | {"q_norm_weight": None, "k_norm_weight": None}
    arguments["position_ids"] = torch.zeros_like(arguments["position_ids"])
    q_out, k_out = rope(**arguments)
    assert torch.equal(q_out, arguments["q"]) and torch.equal(k_out, arguments["k"])


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_conjugate_is_the_gradient(kind):
    arguments = make(kind, 9, torch.float32) | {"q_norm_weight": None, "k_norm_weight": None}
    q, k = arguments["q"].double().requires_grad_(), arguments["k"].double().requires_grad_()
    gradients = torch.randn(9, 4, q.shape[2]), torch.randn(9, 2, q.shape[2])
    expected = torch.autograd.grad(reference.rope(**arguments | {"q": q, "k": k}), (q, k), [g.double() for g in gradients])
    rotated_back = rope(**arguments | {"q": gradients[0], "k": gradients[1]}, conjugate=True)
    for out, gradient in zip(rotated_back, expected, strict=True):
        torch.testing.assert_close(out.double(), gradient, **FP32)


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_any_stride_gives_the_same_bits(kind, poisoned_empty):
    arguments = make(kind, 7, torch.float32)
    q, k, position_ids = arguments["q"], arguments["k"], arguments["position_ids"]
    expected = rope(**arguments | {"q": q.contiguous(), "k": k.contiguous()})

    heads_first = {"q": q.transpose(0, 1).contiguous().transpose(0, 1)}
    wider = torch.zeros(7, 6, q.shape[2] + 1)  # no stride is a multiple of 8
    wider[:, :4, :-1], wider[:, 4:, :-1] = q, k
    odd = {"q": wider[:, :4, :-1], "k": wider[:, 4:, :-1]}
    positions = {"position_ids": position_ids.T.contiguous().T.int()}
    for changes in ({}, heads_first, odd, positions):
        for out, wanted in zip(rope(**arguments | changes), expected, strict=True):
            assert torch.equal(out, wanted) and out.is_contiguous()


def test_expanded_positions_match():
    arguments = make("text", 5, torch.float32)
    arguments["position_ids"] = torch.tensor([[77]]).expand(3, 5)
    for out, expected in zip(rope(**arguments), exact(arguments), strict=True):
        torch.testing.assert_close(out.double(), expected, **FP32)


@pytest.mark.parametrize("strides", [(2**31, 8, 1), (8, 2**31, 1)], ids=["tokens", "heads"])
def test_offsets_above_2_31_are_exact(strides):
    # Only the pages in use take memory
    far = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((2, 2, 8), strides)
    far.copy_(torch.randn(2, 2, 8))
    call = (torch.tensor([[5, 9]]), inverse_frequencies(4, 1e4), [4])
    for q, k in ((far, far.contiguous()), (far.contiguous(), far)):
        for out, expected in zip(rope(q, k, *call), rope(far.contiguous(), far.contiguous(), *call), strict=True):
            assert torch.equal(out, expected)


def test_other_tokens_change_no_bit_and_inputs_are_not_modified():
    arguments = make("text", 6, torch.float32)
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, Tensor)}
    first = rope(**arguments)
    assert all(torch.equal(arguments[name], x) for name, x in before.items())
    changed = arguments["q"].clone()
    changed[3] = torch.nan
    second = rope(**arguments | {"q": changed})
    kept = torch.arange(6) != 3
    assert torch.equal(first[0][kept], second[0][kept]) and torch.equal(first[1], second[1])


def test_no_tokens_give_empty_outputs():
    arguments = make("text", 3, torch.float16)
    arguments |= {name: arguments[name][:0] for name in "qk"} | {"position_ids": arguments["position_ids"][:, :0]}
    q_out, k_out = rope(**arguments)
    assert q_out.shape == (0, 4, 128) and k_out.shape == (0, 2, 128) and q_out.dtype == torch.float16


def test_the_tower_reads_q_and_k_in_the_output_of_the_fused_projection(monkeypatch):
    """Nothing is copied first: the kernel gets the views, and no other operator runs."""
    launched, launch = [], Kernel._launch
    monkeypatch.setattr(Kernel, "_launch", lambda self, *args, **options: launched.append(args) or launch(self, *args, **options))
    qkv = torch.randn(8, 3 * 16 * 72, dtype=torch.float16)
    q, k, _ = (x.view(-1, 16, 72) for x in qkv.split(16 * 72, dim=-1))
    grid, inv_freq = torch.arange(16, dtype=torch.int32).view(2, 8), inverse_frequencies(18, 1e4)
    with count_traffic() as traffic:
        found = ops.rope_2d(q, k, grid, inv_freq, impl="triton")
    assert not traffic.eager_operators and len(traffic.launches) == len(launched) == 1
    pointers = [x.data_ptr() for x in launched[0] if isinstance(x, Tensor)]
    assert pointers[2:4] == [qkv.data_ptr(), qkv.data_ptr() + 2 * 16 * 72]
    for out, expected in zip(found, ops.rope_2d(q.contiguous(), k.contiguous(), grid, inv_freq, impl="triton"), strict=True):
        assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("kind", "heads", "requested", "unique"), [("text", (32, 8), 1.07, 1.02), ("vision", (16, 16), 1.05, 1.02)]
)
def test_memory_traffic_is_close_to_the_floor(kind, heads, requested, unique):
    arguments = make(kind, 32, torch.float16, heads)
    inputs = [x for x in arguments.values() if isinstance(x, Tensor)]
    with count_traffic() as traffic:
        outputs = rope(**arguments)
    # Without the frequencies, which another implementation does not need
    floor = tensor_bytes(*inputs, *outputs) - tensor_bytes(arguments["inv_freq"])
    assert len(traffic.launches) == 1 and traffic.idle_programs == 0 and not traffic.eager_operators
    assert traffic.requested <= requested * floor
    assert traffic.unique <= unique * floor
