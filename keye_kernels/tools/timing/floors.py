"""The matmuls of a stage: their FLOPs, and a call that runs nothing else. Its time is the floor of the stage."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from keye_kernels.model import Keye


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
        linear = sum(2 * rows * weight.numel() for rows, weight in self.linear)
        return linear + sum(4 * a.heads * a.head_dim * a.queries * a.keys for a in self.attention)

    def only(self) -> Callable[[], Tensor]:
        """A call that runs these matmuls by `torch.mm` and `torch.bmm`, and nothing else."""
        like = self.linear[0][1]
        inputs = {(rows, w.shape[1]): torch.randn(rows, w.shape[1]).to(like) for rows, w in self.linear}
        qkv = {
            a: tuple(torch.randn(a.heads, n, a.head_dim).to(like) for n in (a.queries, a.keys, a.keys)) for a in self.attention
        }

        def call() -> Tensor:
            for rows, w in self.linear:
                out = torch.mm(inputs[rows, w.shape[1]], w.t())
            for a in self.attention:
                q, k, v = qkv[a]
                torch.bmm(torch.bmm(q, k.transpose(1, 2)), v)
            return out

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
