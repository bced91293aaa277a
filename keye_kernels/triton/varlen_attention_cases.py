"""The verify cases of varlen_attention."""

from collections.abc import Sequence

import torch

from .cases import FP32_ROUNDOFF, SIGMAS, Arguments, RunReference, Truth, VerifyCase, round_once, subnormal_error, unit_roundoff


def verify_cases(real_sizes: bool, reference: RunReference) -> list[VerifyCase]:
    text, vision = ((32, 8), (16, 16)) if real_sizes else ((2, 1), (2, 2))
    # More than 128 tokens: the interpreter then also runs key blocks without a mask
    segments, prompts = [150, 0, 33, 1], [150, 23, 1]
    if real_sizes:
        segments, prompts = [1024, 576, 0, 252, 84, 4, 1], [1000, 0, 257, 63, 1]
    cases = [
        _verify_case("vision", segments, vision, 72, reference),
        _verify_case("vision, sharp, lse", segments, vision, 72, reference, return_lse=True, sharpness=4.0),
        _verify_case("text, causal", prompts, text, 128, reference, causal=True),
        _verify_case("text, causal, lse", prompts, text, 128, reference, causal=True, return_lse=True),
    ]
    if real_sizes:
        cases.append(_verify_case("vision, one long segment", [4100], (4, 4), 72, reference))
    return cases


def _verify_case(
    label: str, lengths: Sequence[int], heads: tuple[int, int], head_dim: int, reference: RunReference, *,
    causal: bool = False, return_lse: bool = False, sharpness: float = 1.0,
) -> VerifyCase:  # fmt: skip
    def draw(generator: torch.Generator) -> Arguments:
        counts = zip("qkv", (heads[0], heads[1], heads[1]), strict=True)
        arguments = {name: torch.randn(sum(lengths), count, head_dim, generator=generator) for name, count in counts}
        arguments["q"] *= sharpness
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        offsets = {"cu_seqlens": cu_seqlens, "max_seqlen": max(lengths)}
        return {**arguments, **offsets, "causal": causal, "return_lse": return_lse}

    def truth(arguments: Arguments, dtype: torch.dtype) -> Truth:
        """Probabilities p of 16-bit inputs are rounded before they multiply the values; the error of a score is a relative
        error of p. Σp²v² is an attention too: of v² with doubled scores, since p² = exp(2s) / (Σ exp(s))²."""
        q, k, v = (arguments[name] for name in "qkv")
        scale, length = q.shape[-1] ** -0.5, arguments["max_seqlen"]
        both = {**arguments, "return_lse": True}
        out, lse = reference("varlen_attention", **both)
        squares, lse_2 = reference("varlen_attention", **both | {"v": v.square(), "softmax_scale": 2 * scale})
        deviation = (squares * (lse_2 - 2 * lse).exp().T[..., None]).sqrt()
        # |q·k| and its partial sums are at most |q|·|k|
        score_error = FP32_ROUNDOFF * q.shape[-1] ** 0.5 * scale * q.norm(dim=-1, keepdim=True) * k.norm(dim=-1).max()
        score_error = score_error + 4 * FP32_ROUNDOFF  # of exp2
        sums = FP32_ROUNDOFF * (4 + length**0.5)
        p_error = 0.0 if dtype == torch.float32 else unit_roundoff(dtype)
        subnormal = subnormal_error(dtype) * length**0.5 * v.abs().max()
        allowed = round_once(out, dtype) + SIGMAS * (deviation * (p_error + 2 * score_error + sums) + subnormal)
        found = [(out, allowed + (score_error + sums) * out.abs())]
        if return_lse:
            found.append((lse, score_error[..., 0].T + sums + 8 * FP32_ROUNDOFF * (1 + lse.abs())))
        return found

    name = f"{label}, {heads[0]} / {heads[1]} x {head_dim}, T {sum(lengths)}"
    return VerifyCase("varlen_attention", name, draw, truth)
