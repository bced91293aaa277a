"""The verify cases of cache_attention."""

import torch
from torch import Tensor

from .cases import FP32_ROUNDOFF, SIGMAS, Arguments, RunReference, Truth, VerifyCase, round_once, subnormal_error, unit_roundoff

OPERATOR = "cache_attention"
HEADS, KEY_HEADS, HEAD_DIM = 32, 8, 128  # of the decoder of Keye-VL-8B


def verify_cases(real_sizes: bool, reference: RunReference) -> list[VerifyCase]:
    if not real_sizes:
        return [
            _verify_case("one token", 2, 1, 100, (4, 2, 32), reference),
            _verify_case("5 tokens", 1, 5, 70, (4, 1, 16), reference),
        ]
    heads = HEADS, KEY_HEADS, HEAD_DIM
    return [
        _verify_case("one token", 1, 1, 1500, heads, reference),
        _verify_case("one token", 8, 1, 900, heads, reference),
        _verify_case("16 tokens", 2, 16, 700, heads, reference),
        _verify_case("one token, a long cache", 1, 1, 20000, heads, reference),
    ]


def _verify_case(
    label: str, batch_size: int, num_new: int, used: int, heads: tuple[int, int, int], reference: RunReference
) -> VerifyCase:  # fmt: skip
    num_heads, key_heads, head_dim = heads
    cache_slots = used + used // 4  # not all are in use

    def draw(generator: torch.Generator) -> Arguments:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        valid = torch.ones(batch_size, cache_slots, dtype=torch.bool)
        valid[0, : used // 3] = False  # padding on the left
        return {
            "q": normal(batch_size * num_new, num_heads, head_dim),
            "key_cache": normal(batch_size, cache_slots, key_heads, head_dim),
            "value_cache": normal(batch_size, cache_slots, key_heads, head_dim),
            "valid": valid,
            "slots": torch.arange(used - num_new, used),
        }

    def truth(arguments: Arguments, dtype: torch.dtype) -> Truth:
        """As in varlen_attention: probabilities p of 16-bit inputs are rounded before they multiply the values."""
        q, keys, values = arguments["q"], arguments["key_cache"], arguments["value_cache"]
        (out,) = reference(OPERATOR, **arguments)
        seen = arguments["valid"][:, None] & (torch.arange(cache_slots) <= arguments["slots"][:, None])  # [B, S, M]
        grouped = q.view(batch_size, num_new, key_heads, -1, head_dim)
        scores = torch.einsum("bshgd,bmhd->bshgm", grouped, keys) * head_dim**-0.5
        p = scores.masked_fill(~seen[:, :, None, None], -torch.inf).softmax(-1)
        deviation = torch.einsum("bshgm,bmhd->bshgd", p.square(), values.square()).reshape(q.shape).sqrt()
        score_error = FP32_ROUNDOFF * q.norm(dim=-1, keepdim=True) * keys.norm(dim=-1).max()
        score_error = score_error + 4 * FP32_ROUNDOFF  # of exp2
        p_error = 0.0 if dtype == torch.float32 else unit_roundoff(dtype)
        sums = FP32_ROUNDOFF * (4 + used**0.5)
        subnormal = subnormal_error(dtype) * used**0.5 * values.abs().max()
        allowed = SIGMAS * (deviation * (p_error + 2 * score_error + sums) + subnormal)
        return [(out, round_once(out, dtype) + allowed + (score_error + sums) * out.abs())]

    name = f"{label}, B {batch_size}, {used} slots, {num_heads} / {key_heads} x {head_dim}"
    return VerifyCase(OPERATOR, name, draw, truth)
