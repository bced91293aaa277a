"""The verify cases of position_embedding_2d."""

from math import prod

import torch

from .cases import FP32_ROUNDOFF, Arguments, RunReference, Truth, VerifyCase, round_once

OPERATOR = "position_embedding_2d"
CHANNELS, TABLE_ROWS = 1152, 27**2


def verify_cases(real_sizes: bool, reference: RunReference) -> list[VerifyCase]:
    grids = [(1, 24, 26), (3, 16, 18), (1, 34, 24), (1, 2, 2)] if real_sizes else [(1, 4, 6), (2, 2, 4)]
    channels = CHANNELS if real_sizes else 48
    patches = sum(map(prod, grids))

    def draw(generator: torch.Generator) -> Arguments:
        return {
            "features": torch.randn(patches, channels, generator=generator),
            "table": torch.randn(TABLE_ROWS, channels, generator=generator),
            "grid_thw": torch.tensor(grids),
        }

    def truth(arguments: Arguments, dtype: torch.dtype) -> Truth:
        """Four products and four sums in float32, rounded once."""
        absolute = {name: value.abs() for name, value in arguments.items()}
        (out,), (terms,) = (reference(OPERATOR, **given) for given in (arguments, absolute))
        return [(out, round_once(out, dtype) + 8 * FP32_ROUNDOFF * terms)]

    return [VerifyCase(OPERATOR, f"learned positions, T {patches} x {channels}", draw, truth)]
