"""Memory of the vision path is linear in patches: the peak of what torch allocates in one pass."""

import torch

from keye_kernels.model.config import VisionConfig
from keye_kernels.model.vision import VisionTower

C, WIDE = 288, 1072  # four times as wide, as in the real tower


def peak(images):
    """Bytes held at once, above what was held before, by a pass over `images` pictures of 1024 patches."""
    config = VisionConfig(hidden_size=C, intermediate_size=WIDE, num_hidden_layers=2, num_attention_heads=4)
    tower = VisionTower(config, False, "reference")
    grid_thw = torch.tensor([[1, 32, 32]] * images)
    patches = torch.zeros(1024 * images, 3, 14, 14)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        out = tower(patches, tower.geometry(grid_thw, len(patches)))
    assert out.shape == (1024 * images, C)
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = torch.tensor([event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())]).cumsum(0)
    return int(held.max())


def test_doubling_the_images_doubles_the_peak():
    once, twice = peak(4), peak(8)
    assert 1.9 < twice / once < 2.05, (once, twice)


def test_a_layer_holds_each_activation_once():
    patch = 4 * 1024 * 4  # bytes of one channel of all patches
    # What the layer came in with, that normalised, q, k and v, and q and k turned
    attention = 7 * C
    # What it came in with, with attention added, and with the second product; the first one's output
    mlp = 3 * C + WIDE
    # Each patch's place in the batch, and its angles with their sines and cosines
    others = 12 + 5 * 36
    assert max(attention, mlp) < peak(4) / patch < max(attention, mlp) + others + 8
