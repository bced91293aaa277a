"""The verify cases of add_norm."""

import torch
from torch import Tensor

from .cases import FP32_ROUNDOFF, SIGMAS, Arguments, RunReference, Truth, VerifyCase, round_once, unit_roundoff

OPERATOR = "add_norm"
CHANNELS = {"vision": 1152, "text": 4096}  # a LayerNorm, an RMSNorm
EPS = 1e-6


def verify_cases(real_sizes: bool, reference: RunReference) -> list[VerifyCase]:
    rows = 1001 if real_sizes else 37
    vision, text = CHANNELS.values() if real_sizes else (144, 256)
    return [_verify_case("LayerNorm", rows, vision, True, reference), _verify_case("RMSNorm", rows, text, False, reference)]


def _verify_case(label: str, rows: int, channels: int, has_bias: bool, reference: RunReference) -> VerifyCase:
    def draw(generator: torch.Generator) -> Arguments:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        return {
            "x": 0.5 + normal(rows, channels),
            "residual": 4 * normal(rows, channels),
            "weight": 1 + 0.3 * normal(channels),
            "bias": 0.3 * normal(channels) if has_bias else None,
            "eps": EPS,
        }

    def truth(arguments: Arguments, dtype: torch.dtype) -> Truth:
        """The sum is rounded once. Its rounding errors pass through the norm as a variance: of the element itself, and of the
        statistics, to which each of C channels contributes 1/C. Float32 sums of C terms are off by sqrt(C) roundoffs."""
        total, normed = reference(OPERATOR, **arguments)
        weight, bias = arguments["weight"], arguments["bias"]
        normalized = (normed if bias is None else normed - bias) / weight
        scale = (normalized / (total if bias is None else total - total.mean(1, keepdim=True))).abs().amax(1, keepdim=True)
        u = unit_roundoff(dtype)
        variance = (u * scale * total.abs()).square()
        variance += variance.mean(1, keepdim=True) / channels * (1 + normalized.square())
        variance += (FP32_ROUNDOFF * (8 + channels**0.5) * normalized).square()
        variance += (FP32_ROUNDOFF * channels**0.5 * scale).square() * total.square().mean(1, keepdim=True) / channels
        error = SIGMAS * weight.abs() * variance.sqrt() + 4 * FP32_ROUNDOFF * normed.abs()
        return [(total, round_once(total, dtype)), (normed, round_once(normed, dtype) + error)]

    return VerifyCase(OPERATOR, f"{label}, T {rows} x {channels}", draw, truth)
