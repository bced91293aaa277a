"""The matmuls of a stage: their FLOPs, and a call that runs nothing else. Its time is the floor of the stage."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from keye_kernels.model import Keye

from .clock import recorded

PEAK_SIZE, MAX_PEAK_COLUMNS = 4096, 8192  # of a matmul that keeps a GPU at its peak rate


class Attention(NamedTuple):
    """The sizes of the two matmuls of one attention segment."""

    heads: int
    head_dim: int
    queries: int
    keys: int


class Matmuls(NamedTuple):
    """All matmuls of a stage: linear layers as (rows of the input, weight), and attention."""

    linear: list[tuple[int, Tensor]]
    attention: list[Attention]

    @property
    def flops(self) -> int:
        return sum(2 * rows * weight.numel() for rows, weight in self.linear) + self.attention_flops

    @property
    def attention_flops(self) -> int:
        return sum(4 * a.heads * a.head_dim * a.queries * a.keys for a in self.attention)

    def only(self) -> Callable[[], Tensor]:
        """A call that runs these matmuls by torch, and nothing else.

        On a GPU, the FLOPs of attention run as matmuls at the peak rate, because `torch.bmm` would write the scores to memory,
        which no implementation does. Everything is one CUDA graph.
        """
        like = self.linear[0][1]
        inputs = {(rows, w.shape[1]): torch.randn(rows, w.shape[1], device=like.device).to(like) for rows, w in self.linear}
        attend = at_peak(self.attention_flops, like) if like.is_cuda else self._attention_only(like)

        def call() -> Tensor:
            for rows, w in self.linear:
                out = torch.mm(inputs[rows, w.shape[1]], w.t())
            attend()
            return out

        return recorded(call) if like.is_cuda else call

    def _attention_only(self, like: Tensor) -> Callable[[], None]:
        qkv = {
            a: tuple(torch.randn(a.heads, n, a.head_dim).to(like) for n in (a.queries, a.keys, a.keys)) for a in self.attention
        }

        def call() -> None:
            for a in self.attention:
                q, k, v = qkv[a]
                torch.bmm(torch.bmm(q, k.transpose(1, 2)), v)

        return call


def at_peak(flops: int, like: Tensor) -> Callable[[], None]:
    """A call of `torch.mm` that computes about this many FLOPs, in large matmuls."""
    columns = math.ceil(flops / (2 * PEAK_SIZE**2))
    count = math.ceil(columns / MAX_PEAK_COLUMNS)
    left = torch.randn(PEAK_SIZE, PEAK_SIZE, device=like.device).to(like)
    right = torch.randn(PEAK_SIZE, math.ceil(columns / max(count, 1)), device=like.device).to(like)

    def call() -> None:
        for _ in range(count):
            torch.mm(left, right)

    return call


def vision_weights(model: Keye) -> dict[str, Tensor]:
    """The weights of all linear layers of the vision tower and the projector, fused as in `kk.Keye`."""
    parts = {"visual": model.visual, "mlp_AR": model.mlp_AR}
    return {
        f"{part}.{name}": weight.data
        for part, module in parts.items()
        for name, weight in module.named_parameters()
        if weight.ndim == 2 and "position_embedding" not in name
    }


def decoder_weights(model: Keye) -> list[Tensor]:
    """The weights of all linear layers of the decoder, without the head."""
    return [weight.data for weight in model.model.layers.parameters() if weight.ndim == 2]
