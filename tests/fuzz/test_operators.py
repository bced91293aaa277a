"""Operators with wrong shapes, dtypes, strides, ranges and types. Where both run, Triton and the reference agree."""

from itertools import pairwise
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from keye_kernels import ops
from keye_kernels.geometry import VisionBatch
from keye_kernels.segments import Segments

from .harness import check, fuzz
from .json_values import SCALARS

# Of the largest value, and absolute. bfloat16 and float16 inputs are compared after one rounding of the output
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
FLOATS = st.sampled_from([torch.float32] * 6 + list(TOLERANCE))
OTHER_DTYPES = st.sampled_from(
    [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float64]
)
ODD = SCALARS | st.sampled_from(
    [torch.zeros(()), torch.zeros(0), torch.zeros(2, 3), [], {}, [[1.0]], "x", object(), torch.zeros(3, device="meta")]
)
SIZES = st.sampled_from([0, 1, 2, 3, 4, 8, 17])


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@st.composite
def changed(draw: Any, x: torch.Tensor) -> Any:
    """The tensor with another shape, dtype, layout or value, or something else in its place."""
    if x.is_sparse or x.is_meta:
        return x
    change = draw(st.sampled_from(["dtype", "shape", "cut", "strides", "values", "odd", "expand", "grad", "sparse", "meta"]))
    if change == "dtype":
        return x.to(draw(OTHER_DTYPES))
    if change == "shape":
        return draw(st.sampled_from([x[None], x.flatten(), x[..., None], x.transpose(0, -1), x.reshape(-1, 1)])) if x.ndim else x
    if change == "cut":
        axis = draw(st.integers(0, max(0, x.ndim - 1)))
        return x.narrow(axis, 0, max(0, x.shape[axis] - draw(st.sampled_from([1, x.shape[axis]])))) if x.ndim else x
    if change == "strides":
        axis = draw(st.sampled_from([0, x.ndim]))
        return torch.stack([x, x], axis).select(axis, 0)
    # Attention scores that are infinite in float32 are not defined, so values are not larger than 1e15
    if change == "values" and x.numel() and not x.is_complex():
        x = x.clone()
        bad = [-1, 0, 5, 127] if not x.is_floating_point() else [0.0, 1e15, -1e15, float("nan")]
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = draw(st.sampled_from(bad))
        return x
    if change == "expand" and x.ndim:
        return x[:1].expand(x.shape) if len(x) else x
    if change == "grad" and x.is_floating_point():
        return x.clone().requires_grad_()
    if change == "sparse" and x.ndim == 2:
        return x.to_sparse()
    if change == "meta":
        return x.to("meta")
    return draw(ODD)


def with_changes(draw: Any, arguments: dict[str, Any], most: int = 2) -> dict[str, Any]:
    for name in draw(st.lists(st.sampled_from(sorted(arguments)), max_size=most)):
        value = arguments[name]
        arguments[name] = draw(changed(value) if isinstance(value, torch.Tensor) else ODD)
    return arguments


def outputs_of(result: Any) -> list[torch.Tensor] | None:
    if isinstance(result, torch.Tensor):
        return [result]
    return list(result) if isinstance(result, tuple) else None


def check_operator(operator: Any, arguments: dict[str, Any]) -> None:
    results = {impl: check(lambda impl=impl: operator(**arguments, impl=impl)) for impl in ("reference", "triton")}
    reference, triton = map(outputs_of, results.values())
    if reference is None or triton is None:
        # An implementation that was asked for by name may refuse a call: triton has no kernels for float64
        assert triton is None and (reference is None or "impl=" in str(results["triton"])), results
        return
    for expected, found in zip(reference, triton, strict=True):
        assert expected.shape == found.shape and expected.dtype == found.dtype and expected.device == found.device
        if expected.device.type != "meta" and expected.numel():
            scale = max(1.0, expected.double().nan_to_num(0, 0, 0).abs().max().item())
            tolerance = max(TOLERANCE[expected.dtype], *(TOLERANCE[x.dtype] for x in floats_of(arguments))) * scale
            torch.testing.assert_close(found.double(), expected.double(), atol=tolerance, rtol=1e-2, equal_nan=True)


def floats_of(arguments: dict[str, Any]) -> list[torch.Tensor]:
    return [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.dtype in TOLERANCE] or [torch.zeros(())]


@st.composite
def rope_arguments(draw: Any, axes: int) -> dict[str, Any]:
    tokens, heads, kv_heads = draw(SIZES), draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
    dim, dtype, seed = draw(st.sampled_from([4, 8, 16, 12, 2, 6])), draw(FLOATS), draw(st.integers(0, 9))
    position_ids = torch.arange(axes * tokens).reshape(axes, tokens) * draw(st.sampled_from([1, 7, 10**4]))
    arguments = {
        "q": random((tokens, heads, dim), dtype, seed),
        "k": random((tokens, kv_heads, dim), dtype, seed + 1),
        "position_ids": position_ids.to(draw(st.sampled_from([torch.int64, torch.int32]))),
        "inv_freq": torch.rand(dim // (2 if axes == 3 else 4)),
    }
    if axes == 3:
        first = draw(st.integers(0, dim // 2))
        arguments["mrope_section"] = draw(
            st.sampled_from([[first, dim // 2 - first, 0], [first, 0, dim // 2 - first], [1, 1, 1], [-1, 2, 2], "x", None])
        )
        if draw(st.booleans()):
            arguments |= {"q_norm_weight": random((dim,), dtype, seed), "k_norm_weight": random((dim,), dtype, seed), "eps": 1e-6}
    changed_arguments = with_changes(draw, arguments)
    inv_freq = changed_arguments["inv_freq"]
    if isinstance(inv_freq, torch.Tensor) and inv_freq.dtype in TOLERANCE and inv_freq.layout is torch.strided:
        # The kernel computes angles up to 2**23
        changed_arguments["inv_freq"] = torch.where(inv_freq.abs() > 1, 1.0, inv_freq)
    return changed_arguments


@fuzz(50)
@given(arguments=rope_arguments(3))
def test_rope_3d(arguments: dict[str, Any]) -> None:
    check_operator(ops.rope_3d, arguments)


@st.composite
def cache_arguments(draw: Any) -> dict[str, Any]:
    arguments = draw(rope_arguments(3))
    k, sequences = arguments["k"], draw(st.sampled_from([1, 1, 2, 3]))
    tokens, heads, dim = k.shape if isinstance(k, torch.Tensor) and k.ndim == 3 else (4, 2, 8)
    dtype = k.dtype if isinstance(k, torch.Tensor) and k.is_floating_point() and k.itemsize > 1 else torch.float32
    length = tokens // sequences
    cache_slots = length + draw(st.integers(0, 3))
    shape = sequences, cache_slots, heads, dim
    added = {
        "v": random((tokens, heads, dim), dtype, 2),
        "key_cache": random(shape, dtype, 3),
        "value_cache": random(shape, dtype, 4),
        "slots": torch.randperm(cache_slots, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))[:length],
    }
    return arguments | with_changes(draw, added)


def rope_3d_to_copied_cache(**arguments: Any) -> tuple[torch.Tensor, ...]:
    """q, and copies of the caches that were written."""
    copies = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in arguments.items() if "cache" in name}
    return ops.rope_3d_to_cache(**arguments | copies), *copies.values()


@fuzz(40)
@given(arguments=cache_arguments())
def test_rope_3d_to_cache(arguments: dict[str, Any]) -> None:
    slots = arguments["slots"]
    is_valid = isinstance(slots, torch.Tensor) and slots.dtype == torch.int64 and slots.device.type == "cpu"
    if is_valid and len(set(slots.flatten().tolist())) < slots.numel():
        return  # the order in which tokens of one slot are written is not defined
    check_operator(rope_3d_to_copied_cache, arguments)


@st.composite
def cache_attention_arguments(draw: Any) -> dict[str, Any]:
    dtype, seed = draw(FLOATS), draw(st.integers(0, 9))
    sequences, new, key_heads, group = (draw(st.sampled_from([1, 1, 2, 3])) for _ in range(4))
    dim, free = draw(st.sampled_from([8, 16, 72, 12, 0])), draw(st.integers(0, 30))
    cache_slots = new + free
    generator = torch.Generator().manual_seed(seed)
    first = draw(st.integers(0, free))
    arguments = {
        "q": random((sequences * new, key_heads * group, dim), dtype, seed),
        "key_cache": random((sequences, cache_slots, key_heads, dim), dtype, seed + 1),
        "value_cache": random((sequences, cache_slots, key_heads, dim), dtype, seed + 2),
        "valid": torch.rand(sequences, cache_slots, generator=generator) > 0.3,
        "slots": torch.arange(first, first + new),
        "softmax_scale": draw(st.sampled_from([None, 0.5, -0.5, 0.0])),
    }
    return with_changes(draw, arguments)


@fuzz(40)
@given(arguments=cache_attention_arguments())
def test_cache_attention(arguments: dict[str, Any]) -> None:
    check_operator(ops.cache_attention, arguments)


@fuzz(40)
@given(arguments=rope_arguments(2))
def test_rope_2d(arguments: dict[str, Any]) -> None:
    check_operator(ops.rope_2d, arguments)


@st.composite
def attention_arguments(draw: Any) -> dict[str, Any]:
    tokens, kv_heads, group = draw(SIZES), draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
    dim, dtype, seed = draw(st.sampled_from([8, 16, 24, 72])), draw(FLOATS), draw(st.integers(0, 9))
    cuts = draw(st.lists(st.integers(0, tokens), max_size=4))
    offsets = sorted([0, tokens, *cuts]) if draw(st.integers(0, 4)) else [0, *cuts]
    arguments = {
        "q": random((tokens, group * kv_heads, dim), dtype, seed),
        "k": random((tokens, kv_heads, dim), dtype, seed + 1),
        "v": random((tokens, kv_heads, dim), dtype, seed + 2),
        "cu_seqlens": torch.tensor(offsets, dtype=torch.int32),
        "max_seqlen": tokens if draw(st.integers(0, 3)) else draw(st.sampled_from([0, 1, -1, 10**5, 2**31, True, 1.0])),
        "causal": draw(st.booleans()),
        "return_lse": draw(st.booleans()),
        "softmax_scale": draw(st.sampled_from([None, None, 0.5, 0.0, -1.0, 1e9, float("nan"), "x", 1])),
    }
    if offsets == sorted(offsets) and draw(st.integers(0, 4)) == 0:
        lengths = [end - start for start, end in pairwise(offsets)]
        arguments["cu_seqlens"] = Segments.from_lengths(lengths, torch.device("cpu"))
    return with_changes(draw, arguments)


@fuzz(60)
@given(arguments=attention_arguments())
def test_varlen_attention(arguments: dict[str, Any]) -> None:
    check_operator(ops.varlen_attention, arguments)


GRIDS = st.lists(
    st.sampled_from([(1, 2, 2), (1, 2, 4), (2, 2, 2), (1, 4, 2), (1, 3, 2), (1, 1, 1), (0, 2, 2), (1, -2, -2)]), max_size=3
)


def patches_of(grids: list[tuple[int, ...]]) -> int:
    return max(0, sum(t * h * w for t, h, w in grids))


def grid_tensor(draw: Any, grids: list[tuple[int, ...]], side: int, merge: int) -> Any:
    grid_thw = torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)
    valid = grids and all(min(grid) > 0 and grid[1] % merge == grid[2] % merge == 0 for grid in grids)
    if valid and draw(st.integers(0, 3)) == 0:
        return VisionBatch.build(
            grid_thw, patches_of(grids), table_side=side, merge_size=merge, order=draw(st.sampled_from(["block", "raster"]))
        )
    return grid_thw


@st.composite
def position_arguments(draw: Any) -> dict[str, Any]:
    grids, channels, dtype = draw(GRIDS), draw(st.sampled_from([1, 8, 17])), draw(FLOATS)
    side = draw(st.sampled_from([1, 2, 3, 5]))
    arguments = {
        "features": random((patches_of(grids), channels), dtype, 0),
        "table": random((side**2, channels), dtype, 1),
        "grid_thw": grid_tensor(draw, grids, side, 2),
    }
    return with_changes(draw, arguments)


@fuzz(40)
@given(arguments=position_arguments())
def test_position_embedding_2d(arguments: dict[str, Any]) -> None:
    check_operator(ops.position_embedding_2d, arguments)


@st.composite
def projection_arguments(draw: Any) -> dict[str, Any]:
    grids, channels, dtype = draw(GRIDS), draw(st.sampled_from([1, 4, 9])), draw(FLOATS)
    merge, hidden, out = draw(st.sampled_from([2, 2, 1])), draw(st.sampled_from([1, 8, 17])), draw(st.sampled_from([1, 8, 0]))
    width = merge**2 * channels
    norm = draw(st.sampled_from([channels, width]))
    arguments = {
        "features": random((patches_of(grids), channels), dtype, 0),
        "grid_thw": grid_tensor(draw, grids, 3, merge),
        "norm_weight": random((norm,), dtype, 1),
        "norm_bias": random((norm,), dtype, 2),
        "linear_1_weight": random((hidden, width), dtype, 3),
        "linear_1_bias": random((hidden,), dtype, 4),
        "linear_2_weight": random((out, hidden), dtype, 5),
        "linear_2_bias": random((out,), dtype, 6),
        "merge_size": merge,
        "eps": 1e-5,
    }
    return with_changes(draw, arguments)


@fuzz(30)
@given(arguments=projection_arguments())
def test_patch_merge_projection(arguments: dict[str, Any]) -> None:
    check_operator(ops.patch_merge_projection, arguments)


@st.composite
def row_arguments(draw: Any, names: tuple[str, ...], vectors: tuple[str, ...] = ()) -> dict[str, Any]:
    tokens, channels, dtype = draw(SIZES), draw(st.sampled_from([1, 8, 17, 0])), draw(FLOATS)
    arguments = {name: random((tokens, channels), dtype, seed) for seed, name in enumerate(names)}
    arguments |= {name: random((channels,), draw(FLOATS), seed) for seed, name in enumerate(vectors) if draw(st.integers(0, 3))}
    if "weight" in vectors:
        arguments = {"eps": draw(st.sampled_from([1e-6, 0.0, 1.0])), "weight": random((channels,), dtype, 3), **arguments}
    return with_changes(draw, arguments)


@fuzz(20)
@given(arguments=row_arguments(("x", "residual"), ("weight", "bias")))
def test_add_norm(arguments: dict[str, Any]) -> None:
    check_operator(ops.add_norm, arguments)


@fuzz(20)
@given(arguments=row_arguments(("gate", "up")))
def test_silu_mul(arguments: dict[str, Any]) -> None:
    check_operator(ops.silu_mul, arguments)


@st.composite
def few_rows_arguments(draw: Any) -> dict[str, Any]:
    rows, width, columns = draw(SIZES), draw(st.sampled_from([1, 8, 17, 40, 0])), draw(st.sampled_from([0, 1, 2, 7, 20]))
    dtype, silu_mul = draw(FLOATS), draw(st.booleans())
    arguments = {
        "x": random((rows, width), dtype, 0),
        "weight": random((columns * 2 if silu_mul else columns, width), dtype, 1),
        "silu_mul": silu_mul,
    }
    if draw(st.booleans()):
        arguments["bias"] = random((len(arguments["weight"]),), dtype, 2)
    if draw(st.booleans()):
        arguments["residual"] = random((rows, columns), dtype, 3)
    return with_changes(draw, arguments)


@fuzz(40)
@given(arguments=few_rows_arguments())
def test_linear_few_rows(arguments: dict[str, Any]) -> None:
    check_operator(ops.linear_few_rows, arguments)
