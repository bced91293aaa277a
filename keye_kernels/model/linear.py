"""Layers that differ from torch's in how their parameters are held and multiplied, not in what they compute."""

import torch
from torch import Tensor, nn

from keye_kernels.ops.linear import linear


def embedding(rows: int, width: int) -> nn.Embedding:
    """`nn.Embedding` without torch's own initialisation, which on the meta device imports all of torch._dynamo."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class Linear(nn.Linear):
    """`nn.Linear` by `ops.linear`, which on a CPU is faster."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class FusedLinear(Linear):
    """Several projections of one input in one product; `forward` returns their outputs as views of one buffer."""

    def __init__(self, in_features: int, sizes: list[int], bias: bool):
        super().__init__(in_features, sum(sizes), bias=bias)
        self.sizes = sizes

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return super().forward(x).split(self.sizes, dim=-1)
