"""Use this package's layers through the Hugging Face `kernels` package.

    pip install kernels
    python examples/hub_layers.py

A decorator gives the name of the layer that can replace a module's forward. A mapping gives the source of the layer: usually a
repository on the Hub (`LayerRepository`), here the installed package.
"""

from dataclasses import dataclass

import torch
from kernels import Mode, kernelize, use_kernel_forward_from_hub, use_kernel_mapping
from torch import Tensor, nn

from keye_kernels import layers


@dataclass(frozen=True)
class InstalledLayer:
    """The interface of a `kernels` repository, for a layer of the installed package."""

    layer_name: str

    def load(self) -> type[nn.Module]:
        return getattr(layers, self.layer_name)


@use_kernel_forward_from_hub("KeyeProjector")
class Projector(nn.Module):
    """Keye-VL's projector in plain PyTorch, one image after the other."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.pre_norm = nn.LayerNorm(channels, eps=1e-5)
        self.linear_1 = nn.Linear(4 * channels, 4 * channels)
        self.linear_2 = nn.Linear(4 * channels, out)

    def forward(self, image_features: Tensor, image_grid_thw: Tensor) -> Tensor:
        tokens = []
        images = self.pre_norm(image_features).split(image_grid_thw.prod(1).tolist())
        for image, (t, h, w) in zip(images, image_grid_thw.tolist(), strict=True):
            blocks = image.view(t, h // 2, 2, w // 2, 2, -1).transpose(2, 3).reshape(t * h * w // 4, -1)
            tokens.append(self.linear_2(nn.functional.gelu(self.linear_1(blocks))))
        return torch.cat(tokens)


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nn.Sequential(Projector(64, 32)).to(device).eval()
    grids = torch.tensor([[1, 4, 6], [1, 8, 4]])
    features = torch.randn(56, 64, device=device)
    mapping = {"KeyeProjector": {device: InstalledLayer("KeyeProjector")}}
    with torch.inference_mode():
        expected = model[0](features, grids)
        with use_kernel_mapping(mapping):
            model = kernelize(model, mode=Mode.INFERENCE, device=device)
        found = model[0](features, grids)
    print(f"the forward of {type(model[0]).__name__} is now {model[0].forward.__func__.__qualname__}")
    print(f"largest difference: {(found - expected).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
