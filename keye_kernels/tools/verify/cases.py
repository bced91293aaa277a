"""What `verify` computes: one case an operator and use, its inputs, its exact result and the error that rounding explains.

The exact result is float64 on the CPU, of the very inputs that the operator gets (rounded to its dtype first). What may be
lost on the way from there to an output is added up from where a kernel rounds, for each element:

- u is the unit roundoff of the dtype (eps / 2), e that of float32. Rounding the output costs u·|out|, and nothing more where
  arithmetic is float32: one constant times e and the sum of the absolute values of the terms that were added.
- Roundings of many terms of a sum are independent of each other: their errors add up like their squares, so that a sum of
  w·x, each x rounded by u, has a standard deviation below u·sqrt(Σ w²x²). SIGMAS of it are allowed (Higham and Mary 2019,
  "A new approach to probabilistic rounding error analysis"). A worst case over a row of 4608 would excuse almost any mistake.
- Sums of n terms in float32 wander by e·sqrt(n) of themselves, in whatever order they are made.

Symbols: T tokens, H heads, D head dim, C channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log2, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from keye_kernels import ops, reference
from keye_kernels.geometry import cumulative, patch_tensors

Arguments = dict[str, Any]
Truth = list[tuple[Tensor, Tensor]]  # of each output: the exact value and the allowed error

SIGMAS = 6  # one element in a thousand million passes six standard deviations by chance
E = torch.finfo(torch.float32).eps / 2
# Of an angle's cosine and sine in float32 up to 131,072, with and without fused multiply-add (keye_kernels.triton.rope)
COSINE_SINE = 2e-6
FIXED = ("inv_freq", "grid_thw")  # float32 by definition; on the host by definition


@dataclass(frozen=True)
class Case:
    """One use of an operator. `draw` makes its arguments by name, floating ones in float32 on the CPU; `truth` takes those
    in float64 and the dtype under test."""

    operator: str
    label: str
    draw: Callable[[torch.Generator], Arguments]
    truth: Callable[[Arguments, torch.dtype], Truth]

    def run(self, arguments: Arguments, impl: str) -> tuple[Tensor, ...]:
        outputs = getattr(ops, self.operator)(**arguments, impl=impl)
        return outputs if isinstance(outputs, tuple) else (outputs,)


def cast(arguments: Arguments, dtype: torch.dtype, device: torch.device) -> Arguments:
    """The arguments in a dtype and on a device, except for what is FIXED."""

    def move(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or name == "grid_thw":
            return value
        return value.to(device, dtype if value.is_floating_point() and name not in FIXED else None)

    return {name: move(name, value) for name, value in arguments.items()}


def cases(real_sizes: bool) -> list[Case]:
    """Every operator in the ways that Keye uses it: at the sizes of Keye-VL-8B, or at ones that the interpreter can bear."""
    text, vision = ((32, 8), (16, 16)) if real_sizes else ((2, 1), (2, 2))
    # Past 128 tokens the interpreter, too, meets tiles of keys that no mask cuts
    tokens, segments, prompts = 37, [150, 0, 33, 1], [150, 23, 1]
    grids, few, channels, hidden, out = [(1, 4, 6), (2, 2, 4)], [(1, 2, 2), (1, 4, 2)], 48, 80, 72
    if real_sizes:
        tokens, segments, prompts = 1001, [1024, 576, 0, 252, 84, 4, 1], [1000, 0, 257, 63, 1]
        grids, few = [(1, 24, 26), (3, 16, 18), (1, 34, 24), (1, 2, 2)], [(1, 16, 20), (2, 12, 10), (1, 2, 2)]
        channels, hidden, out = 1152, 4608, 4096
    chosen = [
        _rope_3d("text", tokens, text, norm=False),
        _rope_3d("text, norm", tokens, text, norm=True),
        _rope_2d("vision", tokens, vision),
        _attention("vision", segments, vision, 72),
        _attention("vision, sharp, lse", segments, vision, 72, return_lse=True, sharpness=4.0),
        _attention("text, causal", prompts, text, 128, causal=True),
        _attention("text, causal, lse", prompts, text, 128, causal=True, return_lse=True),
        # A few rows: their statistics are a launch of their own
        _projection("norm before merge, few rows", few, channels, hidden, out, norm_width=channels),
        _projection("norm after merge, few rows", few, channels, hidden, out, norm_width=4 * channels),
        _projection("norm before merge", grids, channels, hidden, out, norm_width=channels),
        _projection("norm after merge", grids, channels, hidden, out, norm_width=4 * channels),
        _position("learned positions", grids, channels),
    ]
    if real_sizes:
        chosen.append(_attention("vision, one long segment", [4100], (4, 4), 72))
    return chosen


def _rope_3d(label: str, tokens: int, heads: tuple[int, int], norm: bool) -> Case:
    def draw(generator: torch.Generator) -> Arguments:
        norms = ("q_norm_weight", "k_norm_weight") if norm else ()
        return {
            **_heads(generator, tokens, heads, 128, "qk"),
            "position_ids": torch.randint(0, 40_000, (3, tokens), generator=generator),
            "inv_freq": 1e6 ** -(torch.arange(64) / 64),
            "mrope_section": [16, 24, 24],
            **{name: 1 + 0.3 * torch.randn(128, generator=generator) for name in norms},
        }

    return Case("rope_3d", f"{label}, {heads[0]} + {heads[1]} x 128, T {tokens}", draw, _rope_truth)


def _rope_2d(label: str, tokens: int, heads: tuple[int, int]) -> Case:
    def draw(generator: torch.Generator) -> Arguments:
        return {
            **_heads(generator, tokens, heads, 72, "qk"),
            "position_ids": torch.randint(0, 400, (2, tokens), generator=generator),
            "inv_freq": 1e4 ** -(torch.arange(18) / 18),
        }

    return Case("rope_2d", f"{label}, {heads[0]} + {heads[1]} x 72, T {tokens}", draw, _rope_truth)


def _rope_truth(arguments: Arguments, dtype: torch.dtype) -> Truth:
    """x cos - y sin: rounded once, after COSINE_SINE, two products and a sum; the norm adds a mean of squares and a root."""
    operator = ops.rope_3d if "mrope_section" in arguments else ops.rope_2d
    exact = operator(**arguments, impl="reference")
    truth = []
    for name, out in zip("qk", exact, strict=True):
        weight = arguments.get(f"{name}_norm_weight")
        first, second = reference.rms_norm(arguments[name], weight, 1e-6).abs().chunk(2, dim=-1)
        roundings = 4 if weight is None else 12 + log2(out.shape[-1])
        terms = (first + second).repeat(1, 1, 2)
        truth.append((out, _round_once(out, dtype) + (COSINE_SINE + roundings * E) * terms))
    return truth


def _attention(
    label: str,
    lengths: Sequence[int],
    heads: tuple[int, int],
    head_dim: int,
    *,
    causal: bool = False,
    return_lse: bool = False,
    sharpness: float = 1.0,
) -> Case:
    def draw(generator: torch.Generator) -> Arguments:
        arguments = _heads(generator, sum(lengths), heads, head_dim, "qkv")
        arguments["q"] *= sharpness
        offsets = {"cu_seqlens": cumulative(list(lengths)), "max_seqlen": max(lengths)}
        return {**arguments, **offsets, "causal": causal, "return_lse": return_lse}

    return Case("varlen_attention", f"{label}, {heads[0]} / {heads[1]} x {head_dim}, T {sum(lengths)}", draw, _attend)


def _attend(arguments: Arguments, dtype: torch.dtype) -> Truth:
    """The probabilities p of 16-bit inputs are rounded before they meet the values, and a score's error is p's relative one.

    Σp²v² for the sum of squares is an attention too: of v² with doubled scores, since p² = exp(2s) / (Σ exp(s))².
    """
    q, k, v = (arguments[name] for name in "qkv")
    scale, length = q.shape[-1] ** -0.5, arguments["max_seqlen"]
    both = {**arguments, "return_lse": True, "impl": "reference"}
    out, lse = ops.varlen_attention(**both)
    squares, lse_2 = ops.varlen_attention(**both | {"v": v.square(), "softmax_scale": 2 * scale})
    deviation = (squares * (lse_2 - 2 * lse).exp().T[..., None]).sqrt()
    # |q·k| and its partial sums stay under the product of the lengths
    score_error = E * q.shape[-1] ** 0.5 * scale * q.norm(dim=-1, keepdim=True) * k.norm(dim=-1).max()
    score_error = score_error + 4 * E  # of exp2
    sums = E * (4 + length**0.5)
    of_p = 0.0 if dtype == torch.float32 else _unit(dtype)
    subnormal = _smallest(dtype) * length**0.5 * v.abs().max()
    allowed = _round_once(out, dtype) + SIGMAS * (deviation * (of_p + 2 * score_error + sums) + subnormal)
    truth = [(out, allowed + (score_error + sums) * out.abs())]
    if arguments["return_lse"]:
        truth.append((lse, score_error[..., 0].T + sums + 8 * E * (1 + lse.abs())))
    return truth


def _projection(
    label: str, grids: Sequence[tuple[int, int, int]], channels: int, hidden: int, out: int, norm_width: int
) -> Case:
    patches = sum(map(prod, grids))

    def draw(generator: torch.Generator) -> Arguments:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        return {
            "features": 0.5 + normal(patches, channels),
            "grid_thw": torch.tensor(grids),
            "norm_weight": 1 + 0.3 * normal(norm_width),
            "norm_bias": 0.3 * normal(norm_width),
            "linear_1_weight": normal(hidden, 4 * channels) * (4 * channels) ** -0.5,
            "linear_1_bias": 0.3 * normal(hidden),
            "linear_2_weight": normal(out, hidden) * hidden**-0.5,
            "linear_2_bias": 0.3 * normal(out),
        }

    return Case("patch_merge_projection", f"{label}, T {patches} x {channels}", draw, _project)


def _project(arguments: Arguments, dtype: torch.dtype) -> Truth:
    """Written out in float64. Rounded are the normalised row, what goes into the GELU (some paths), what comes out of it,
    and the output; each rounding goes on through the products as a variance. The slope of GELU is below 1.13."""
    x, u = arguments["features"], _unit(dtype)
    weight, bias = arguments["norm_weight"], arguments["norm_bias"]
    index = patch_tensors([tuple(grid) for grid in arguments["grid_thw"].tolist()], 1, 2, "raster")[-1]
    if len(weight) == x.shape[1]:
        merged = F.layer_norm(x, weight.shape, weight, bias)[index].flatten(1)
    else:
        merged = F.layer_norm(x[index].flatten(1), weight.shape, weight, bias)
    weight_1, weight_2 = arguments["linear_1_weight"], arguments["linear_2_weight"]
    before = F.linear(merged, weight_1, arguments["linear_1_bias"])
    hidden = F.gelu(before)
    out = F.linear(hidden, weight_2, arguments["linear_2_bias"])

    of_norm = (u + 8 * E) ** 2 + E**2 * merged.shape[1]
    variance = of_norm * F.linear(merged.square(), weight_1.square()) + ((u + 4 * E) * before).square()
    variance = 1.13**2 * variance + (u * hidden).square()
    variance = F.linear(variance, weight_2.square())
    variance += E**2 * hidden.shape[1] * F.linear(hidden.square(), weight_2.square())
    return [(out, _round_once(out, dtype) + SIGMAS * variance.sqrt())]


def _position(label: str, grids: Sequence[tuple[int, int, int]], channels: int) -> Case:
    patches = sum(map(prod, grids))

    def draw(generator: torch.Generator) -> Arguments:
        return {
            "features": torch.randn(patches, channels, generator=generator),
            "table": torch.randn(27**2, channels, generator=generator),
            "grid_thw": torch.tensor(grids),
        }

    return Case("position_embedding_2d", f"{label}, T {patches} x {channels}", draw, _add_positions)


def _add_positions(arguments: Arguments, dtype: torch.dtype) -> Truth:
    """Four products and four sums in float32, rounded once."""
    absolute = {name: value.abs() for name, value in arguments.items()}
    out, terms = (ops.position_embedding_2d(**inputs, impl="reference") for inputs in (arguments, absolute))
    return [(out, _round_once(out, dtype) + 8 * E * terms)]


def _heads(generator: torch.Generator, tokens: int, heads: tuple[int, int], head_dim: int, names: str) -> Arguments:
    """q with heads[0] heads, k (and v) with heads[1]."""
    return {
        name: torch.randn(tokens, heads[0] if name == "q" else heads[1], head_dim, generator=generator)
        for name in names
    }


def _unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _smallest(dtype: torch.dtype) -> float:
    """Half the distance of subnormal numbers: what rounding costs near zero."""
    return torch.finfo(dtype).tiny * _unit(dtype)


def _round_once(exact: Tensor, dtype: torch.dtype) -> Tensor:
    # Past u: the value that is rounded is off by its own small error already, which may carry it over a power of two
    return (1 + 2**-6) * _unit(dtype) * exact.abs() + _smallest(dtype)
