"""The verify cases of silu_mul."""

import torch

from .cases import FP32_ROUNDOFF, Arguments, RunReference, Truth, VerifyCase, round_once

OPERATOR = "silu_mul"
CHANNELS = 12_288
# Below -88.7, exp(-gate) is infinite in float32 and the result is 0 instead of up to 3e-37 * up
FLUSHED = 2e-36


def verify_cases(real_sizes: bool, reference: RunReference) -> list[VerifyCase]:
    rows, channels = (101, CHANNELS) if real_sizes else (37, 200)

    def draw(generator: torch.Generator) -> Arguments:
        # Beyond +-88 the exponential is infinite or 0 in float32
        gate = 30 * torch.randn(rows, channels, generator=generator)
        return {"gate": gate, "up": torch.randn(rows, channels, generator=generator)}

    def truth(arguments: Arguments, dtype: torch.dtype) -> Truth:
        """An exponential, whose relative error grows with its argument, a division and a product in float32, rounded once."""
        (out,) = reference(OPERATOR, **arguments)
        roundoffs = 8 + 2 * arguments["gate"].abs()
        return [(out, round_once(out, dtype) + roundoffs * FP32_ROUNDOFF * out.abs() + FLUSHED)]

    return [VerifyCase(OPERATOR, f"gate of the MLP, T {rows} x {channels}", draw, truth)]
