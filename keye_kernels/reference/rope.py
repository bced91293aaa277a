"""Rotary position embedding over several position axes, after an optional RMSNorm of each head."""

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 tensors, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def rope(
    q: Tensor, k: Tensor, position_ids: Tensor, inv_freq: Tensor, sections: list[int],
    q_norm_weight: Tensor | None = None, k_norm_weight: Tensor | None = None, eps: float = 1e-6, conjugate: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Copies of q [T, Hq, D] and k [T, Hk, D], channels (i, i + D/2) rotated by `position_ids[axis(i)] * inv_freq[i % F]`.

    position_ids [axes, T] are integers. inv_freq is float32 [F]: the text model has one frequency per pair (64), the vision tower
    uses its 18 for the row and again for the column. `sections`: number of pairs of each axis, in order; the sum is D/2. Norm
    weights [D]: an RMSNorm of each head before the rotation. `conjugate` rotates backwards (the gradient of the rotation).
    Source of the maths: docs/models/keye_vl_1_5.md, "Vision tower" and "3D position ids". Angles are float32, as
    in the official code.
    """
    cos, sin = rotation_tables(position_ids, inv_freq, sections, compute_dtype(q), conjugate)
    q_out = rotate(rms_norm(q, q_norm_weight, eps), cos, sin).to(q.dtype)
    return q_out, rotate(rms_norm(k, k_norm_weight, eps), cos, sin).to(k.dtype)


def rope_to_cache(
    q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor, inv_freq: Tensor, sections: list[int],
    key_cache: Tensor, value_cache: Tensor, slots: Tensor,
    q_norm_weight: Tensor | None = None, k_norm_weight: Tensor | None = None, eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """`rope`, which writes k and v [B·S, Hk, D] to the slots [S] of the caches [B, M, Hk, D] in place, and returns q."""
    q_out, k_out = rope(q, k, position_ids, inv_freq, sections, q_norm_weight, k_norm_weight, eps)
    write_slots(k_out, key_cache, slots)
    write_slots(v, value_cache, slots)
    return q_out


def write_slots(x: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Writes x [B·S, Hk, D] to cache[:, slots]."""
    cache.index_copy_(1, slots, x.unflatten(0, (cache.shape[0], slots.shape[0])))


def rotation_tables(
    position_ids: Tensor, inv_freq: Tensor, sections: list[int], dtype: torch.dtype, conjugate: bool
) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles, [T, 1, D/2] in `dtype`; see `rope`."""
    pairs, device = sum(sections), position_ids.device
    axes, counts = torch.arange(len(sections), device=device), torch.tensor(sections, device=device)
    axis = torch.repeat_interleave(axes, counts, output_size=pairs)
    frequency = inv_freq.float().repeat(pairs // inv_freq.shape[0])
    # Indexed after the transpose, so that the tables are contiguous
    angle = (position_ids.float().T[:, axis] * frequency).to(dtype)[:, None]
    return angle.cos(), -angle.sin() if conjugate else angle.sin()


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm of the last axis, returned in the compute dtype; without a weight only the cast."""
    x = x.to(compute_dtype(x))
    if weight is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    """Rotates x [T, H, D] by the tables of `rotation_tables`, all in the compute dtype; writes to `out` if it is given."""
    # In place: separate tensors for the products would set the peak memory of the tower for a large image
    half = x.shape[-1] // 2
    out = torch.mul(x, torch.cat((cos, cos), dim=-1), out=out)
    out[..., :half].addcmul_(x[..., half:], sin, value=-1)
    out[..., half:].addcmul_(x[..., :half], sin)
    return out
