"""Images encoded with and without CUDA graphs, on a CPU that plays the GPU."""

import torch
from torch import nn

from keye_kernels.model import graphs, image_graphs
from tests.helpers.fake_graphs import FakeGpu

ROUNDING = {"atol": 2e-5, "rtol": 2e-5}
GRIDS = [(1, 8, 6), (2, 4, 4), (1, 2, 10)]


def play_gpu(monkeypatch):
    """The CPU in place of a GPU, with small buckets."""
    monkeypatch.setattr(graphs, "DEVICE_TYPES", ("cpu",))
    monkeypatch.setattr(graphs, "runs_triton", lambda module, device: getattr(module, "impl", "auto") != "reference")
    monkeypatch.setattr(image_graphs, "PATCH_BUCKETS", (64, 128, 256))
    return FakeGpu(monkeypatch)


def inputs(*grids, seed=0, dtype=torch.float32):
    grid_thw = torch.tensor(grids)
    shape = int(grid_thw.prod(1).sum()), 3, 14, 14
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=generator, dtype=dtype), grid_thw
    return torch.randn(shape, generator=generator).to(dtype), grid_thw


@torch.no_grad()
def eager(model, pixels, grid_thw):
    used, model.cuda_graphs = model.cuda_graphs, False
    features = model.get_image_features(pixels, grid_thw)
    model.cuda_graphs = used
    return features


@torch.no_grad()
def encode(model, *grids, times=1, **options):
    pixels, grid_thw = inputs(*grids, **options)
    for _ in range(times):
        features = model.get_image_features(pixels, grid_thw)
    return features


def replaced(model):
    model.visual.layers[1].mlp.fc1.weight = nn.Parameter(torch.randn_like(model.visual.layers[1].mlp.fc1.weight))
