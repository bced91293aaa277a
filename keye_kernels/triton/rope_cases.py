"""The verify cases of rope_2d, rope_3d and rope_3d_to_cache."""

from dataclasses import dataclass
from math import log2

import torch
from torch import Tensor

from .cases import FP32_ROUNDOFF, Arguments, RunReference, Truth, VerifyCase, round_once

# Error of cosine and sine in float32, for angles up to 131,072, with and without fused multiply-add
COS_SIN_ERROR = 2e-6
CACHED_SEQUENCES = 3


@dataclass(frozen=True)
class Sizes:
    """One use of the kernel in Keye-VL-8B."""

    heads: tuple[int, int]  # of q and k
    head_dim: int
    sections: tuple[int, ...]
    num_frequencies: int
    theta: float
    max_position: int


SIZES = {"text": Sizes((32, 8), 128, (16, 24, 24), 64, 1e6, 40_000), "vision": Sizes((16, 16), 72, (18, 18), 18, 1e4, 400)}


def inverse_frequencies(sizes: Sizes, device: torch.device | str = "cpu") -> Tensor:
    return sizes.theta ** -(torch.arange(sizes.num_frequencies, device=device) / sizes.num_frequencies)


def verify_cases(real_sizes: bool, reference: RunReference) -> list[VerifyCase]:
    tokens = 1001 if real_sizes else 37
    text, vision = (SIZES[part].heads if real_sizes else (2, 1) for part in ("text", "vision"))
    return [
        _verify_case("text", "text", tokens, text, reference, norm=False),
        _verify_case("text", "text, norm", tokens, text, reference, norm=True),
        _verify_case("vision", "vision", tokens, vision, reference, norm=False),
        _cache_case(tokens, text, reference),
    ]


def _cache_case(tokens: int, heads: tuple[int, int], reference: RunReference) -> VerifyCase:
    """Several sequences. The new tokens are in every second slot of the cache, in reverse order."""
    case = _verify_case("text", "text, norm", CACHED_SEQUENCES * tokens, heads, reference, norm=True)
    head_shape = heads[1], SIZES["text"].head_dim
    slots = torch.arange(2 * tokens - 1, 0, -2)

    def draw(generator: torch.Generator) -> Arguments:
        cache_shape = CACHED_SEQUENCES, 2 * tokens + 1, *head_shape
        v, keys, values = (
            torch.randn(size, generator=generator)
            for size in ((CACHED_SEQUENCES * tokens, *head_shape), cache_shape, cache_shape)
        )
        return case.draw(generator) | {"v": v, "key_cache": keys, "value_cache": values, "slots": slots}

    def truth(arguments: Arguments, dtype: torch.dtype) -> Truth:
        """That of rope_3d in the slots of k; other slots and v are exact."""
        v, keys, values, slots = (arguments[name] for name in ("v", "key_cache", "value_cache", "slots"))
        rotation = {name: x for name, x in arguments.items() if name not in ("v", "key_cache", "value_cache", "slots")}
        q, (k, k_allowed) = case.truth(rotation, dtype)
        k, k_allowed, v = (x.unflatten(0, (CACHED_SEQUENCES, tokens)) for x in (k, k_allowed, v))
        key_error = torch.zeros_like(keys).index_copy(1, slots, k_allowed)
        return [q, (keys.index_copy(1, slots, k), key_error), (values.index_copy(1, slots, v), torch.zeros_like(values))]

    return VerifyCase("rope_3d_to_cache", case.label, draw, truth, written=("key_cache", "value_cache"))


def _verify_case(part: str, label: str, tokens: int, heads: tuple[int, int], reference: RunReference, norm: bool) -> VerifyCase:
    sizes = SIZES[part]
    operator = "rope_3d" if part == "text" else "rope_2d"

    def draw(generator: torch.Generator) -> Arguments:
        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        arguments = {name: normal(tokens, count, sizes.head_dim) for name, count in zip("qk", heads, strict=True)}
        shape = (len(sizes.sections), tokens)
        arguments["position_ids"] = torch.randint(0, sizes.max_position, shape, generator=generator)
        arguments["inv_freq"] = inverse_frequencies(sizes)
        if part == "text":
            arguments["mrope_section"] = list(sizes.sections)
        for name in ("q_norm_weight", "k_norm_weight") if norm else ():
            arguments[name] = 1 + 0.3 * normal(sizes.head_dim)
        return arguments

    def truth(arguments: Arguments, dtype: torch.dtype) -> Truth:
        """x cos - y sin is rounded once, after COS_SIN_ERROR, two products and a sum; the norm adds a mean and a root."""
        found = []
        for name, out in zip("qk", reference(operator, **arguments), strict=True):
            x, weight = arguments[name], arguments.get(f"{name}_norm_weight")
            if weight is not None:
                x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight
            first, second = x.abs().chunk(2, dim=-1)
            roundings = 4 if weight is None else 12 + log2(out.shape[-1])
            terms = (first + second).repeat(1, 1, 2)
            found.append((out, round_once(out, dtype) + (COS_SIN_ERROR + roundings * FP32_ROUNDOFF) * terms))
        return found

    return VerifyCase(operator, f"{label}, {heads[0]} + {heads[1]} x {sizes.head_dim}, T {tokens}", draw, truth)
