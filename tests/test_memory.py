"""Memory of the vision path is linear in patches: the peak of what torch allocates in one pass."""

import torch

from keye_kernels.model.config import VisionConfig
from keye_kernels.model.vision import VisionTower


def peak(images):
    """Bytes held at once, above what was held before, by a pass over `images` pictures of 1024 patches."""
    config = VisionConfig(hidden_size=144, intermediate_size=304, num_hidden_layers=2, num_attention_heads=2)
    tower = VisionTower(config, False, "reference")
    grid_thw = torch.tensor([[1, 32, 32]] * images)
    patches = torch.zeros(1024 * images, 3, 14, 14)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        out = tower(patches, tower.geometry(grid_thw, len(patches)))
    assert out.shape == (1024 * images, 144)
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = torch.tensor([event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())]).cumsum(0)
    return int(held.max())


def test_doubling_the_images_doubles_the_peak():
    once, twice = peak(4), peak(8)
    assert once > 2 * 4 * 1024 * 304 * 4  # the widest activation, before and after its GELU
    assert 1.9 < twice / once < 2.05, (once, twice)
