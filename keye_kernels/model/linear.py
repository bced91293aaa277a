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
    """Several projections of one input, their parameters in one piece.

    `forward` makes one product, whose parts it returns as views; on a CPU, which gains nothing by that, or where told to, one
    for each part, so that the memory of each is its own.
    """

    def __init__(self, in_features: int, sizes: list[int], bias: bool):
        super().__init__(in_features, sum(sizes), bias=bias)
        self.sizes = sizes

    def forward(self, x: Tensor, apart: bool = False) -> tuple[Tensor, ...]:
        if x.device.type != "cpu" and not apart:
            return super().forward(x).split(self.sizes, dim=-1)
        biases = [None] * len(self.sizes) if self.bias is None else self.bias.split(self.sizes)
        return tuple(linear(x, *part) for part in zip(self.weight.split(self.sizes), biases, strict=True))
