"""A shape made into tensors of Keye's sizes: how a tile runs on it, and what the reference says of some of its rows."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from keye_kernels import reference
from keye_kernels.triton import matmul, patch_merge, position_embedding, rope, varlen_attention
from keye_kernels.triton.tiles import Config

from . import kernels
from .shapes import MERGED, Shape

CHECKED = 2048  # rows at either end that are compared with the reference
POSITIONS = 27**2  # rows of the learned position table


@dataclass
class Problem:
    """Inputs of one shape, held by its two functions."""

    launch: Callable[[Config], tuple[Tensor, ...]]
    expect: Callable[[torch.dtype], tuple[Tensor, ...]]  # the reference in a dtype, of `rows` alone
    rows: Tensor


def make_problem(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Random inputs, the same in every call."""
    make = {
        "rope": _rope,
        "position_embedding_2d": _position_embedding,
        "varlen_attention": _attention,
        "linear": _linear,
        "patch_merge": _patch_merge,
    }[shape.kernel]
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype) * scale

    return make(shape, normal)


def _ends(total: int, device: torch.device) -> Tensor:
    """The first and last CHECKED rows."""
    head = torch.arange(min(total, CHECKED), device=device)
    return torch.cat((head, torch.arange(max(len(head), total - CHECKED), total, device=device)))


def _rope(shape: Shape, normal: Callable[..., Tensor]) -> Problem:
    (q_heads, k_heads), head_dim, sections, frequencies = rope.TEXT if shape.part == "text" else rope.VISION
    q, k = normal(shape.total, q_heads, head_dim), normal(shape.total, k_heads, head_dim)
    weights = (normal(head_dim), normal(head_dim)) if shape.part == "text" else (None, None)
    inv_freq = 10000.0 ** -(torch.arange(frequencies, device=q.device) / frequencies)
    position_ids = (
        torch.arange(shape.total, device=q.device).remainder(shape.size).expand(len(sections), -1).contiguous()
    )
    rows = _ends(shape.total, q.device)

    def expect(dtype: torch.dtype) -> tuple[Tensor, ...]:
        norms = (weight if weight is None else weight.to(dtype) for weight in weights)
        return reference.rope(
            q[rows].to(dtype), k[rows].to(dtype), position_ids[:, rows], inv_freq, list(sections), *norms
        )

    return Problem(lambda c: rope.rope(q, k, position_ids, inv_freq, list(sections), *weights, config=c), expect, rows)


def _position_embedding(shape: Shape, normal: Callable[..., Tensor]) -> Problem:
    features, table = normal(shape.total, kernels.CHANNELS), normal(POSITIONS, kernels.CHANNELS)
    corner = torch.arange(4, device=features.device) + torch.arange(shape.total, device=features.device)[:, None]
    index, weight = (corner % POSITIONS).int(), torch.full(corner.shape, 0.25, device=features.device)
    rows = _ends(shape.total, features.device)

    def expect(dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (reference.position_embedding_2d(features[rows].to(dtype), table.to(dtype), index[rows], weight[rows]),)

    def launch(config: Config) -> tuple[Tensor, ...]:
        return (position_embedding.position_embedding_2d(features, table, index, weight, config),)

    return Problem(launch, expect, rows)


def _attention(shape: Shape, normal: Callable[..., Tensor]) -> Problem:
    heads, key_heads, head_dim = kernels.attention_part(shape.part)
    causal, scale = shape.part == "text", head_dim**-0.5
    q, k, v = (normal(shape.total, n, head_dim) for n in (heads, key_heads, key_heads))
    cu_seqlens = torch.arange(0, shape.total + 1, shape.size, dtype=torch.int32, device=q.device)
    # whole segments: the first and the last
    segments = sorted({0, shape.count - 1})
    rows = torch.cat([torch.arange(s * shape.size, (s + 1) * shape.size, device=q.device) for s in segments])

    def expect(dtype: torch.dtype) -> tuple[Tensor, ...]:
        parts = (x[rows].to(dtype) for x in (q, k, v))
        return (reference.varlen_attention(*parts, cu_seqlens[: len(segments) + 1], scale, causal, False)[0],)

    def launch(config: Config) -> tuple[Tensor, ...]:
        return varlen_attention.varlen_attention(q, k, v, cu_seqlens, shape.size, scale, causal, False, config)[:1]

    return Problem(launch, expect, rows)


def _linear(shape: Shape, normal: Callable[..., Tensor]) -> Problem:
    x, weight = normal(shape.total, kernels.HIDDEN), normal(kernels.OUT, kernels.HIDDEN, scale=kernels.HIDDEN**-0.5)
    bias, rows = normal(kernels.OUT), _ends(shape.total, x.device)

    def expect(dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (torch.nn.functional.linear(x[rows].to(dtype), weight.to(dtype), bias.to(dtype)),)

    return Problem(lambda config: (matmul.linear(x, weight, bias, config),), expect, rows)


def _patch_merge(shape: Shape, normal: Callable[..., Tensor]) -> Problem:
    features = normal(shape.total * MERGED, kernels.CHANNELS)
    hidden, out = kernels.HIDDEN, kernels.OUT
    weights = [1 + 0.1 * normal(kernels.CHANNELS), normal(kernels.CHANNELS)]
    weights += [normal(hidden, hidden, scale=hidden**-0.5), normal(hidden)]
    weights += [normal(out, hidden, scale=hidden**-0.5), normal(out)]
    rows = _ends(shape.total, features.device)
    blocks = torch.arange(shape.total * MERGED, device=features.device).view(-1, MERGED)
    index = None
    if shape.part == "raster":  # two rows of patches, of which each block joins two and two
        index = blocks.flatten().view(2, -1, 2).transpose(0, 1).reshape(-1, MERGED).int().contiguous()

    def expect(dtype: torch.dtype) -> tuple[Tensor, ...]:
        joined = features[(blocks if index is None else index)[rows].flatten()]
        return (reference.patch_merge_projection(joined.to(dtype), None, *(weight.to(dtype) for weight in weights)),)

    def launch(config: Config) -> tuple[Tensor, ...]:
        return (patch_merge.patch_merge_projection(features, index, *weights, config=config),)

    return Problem(launch, expect, rows)
