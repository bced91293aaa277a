"""Linear and embedding layers that compute what torch's do, with other memory layouts or faster kernels."""

import torch
from torch import Tensor, nn

from keye_kernels.ops.linear import linear


def embedding(rows: int, width: int) -> nn.Embedding:
    """An `nn.Embedding` without torch's initialization, which imports torch._dynamo when run on the meta device."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class Linear(nn.Linear):
    """`nn.Linear` through `ops.linear`, which is faster on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class FusedLinear(Linear):
    """Projections of one input to the widths `sizes`, with their parameters concatenated in one weight and one bias."""

    def __init__(self, in_features: int, sizes: list[int], bias: bool):
        super().__init__(in_features, sum(sizes), bias=bias)
        self.sizes = sizes

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """The output of each projection: views of the output of one matmul, except on a CPU, where several are as fast."""
        if x.device.type != "cpu":
            return super().forward(x).split(self.sizes, dim=-1)
        biases = [None] * len(self.sizes) if self.bias is None else self.bias.split(self.sizes)
        return tuple(linear(x, *part) for part in zip(self.weight.split(self.sizes), biases, strict=True))
