"""Peak memory that torch allocates in one forward of the vision tower: linear in the number of patches."""

import torch

from keye_kernels.model.config import VisionConfig
from keye_kernels.model.vision import VisionTower

HIDDEN, INTERMEDIATE = 288, 1072  # a ratio of about 4, as in the released tower


def peak_bytes(images):
    """Peak bytes that a forward allocates for `images` images of 1024 patches."""
    config = VisionConfig(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=2, num_attention_heads=4)
    tower = VisionTower(config, False, "reference")
    # Uninitialized weights may be NaN, and attention of NaN runs without SDPA
    torch.nn.init.zeros_(tower.position_embedding.weight)
    grid_thw = torch.tensor([[1, 32, 32]] * images)
    patches = torch.zeros(1024 * images, 3, 14, 14)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        out = tower(patches, tower.geometry(grid_thw, len(patches)))
    assert out.shape == (1024 * images, HIDDEN)
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = torch.tensor([event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())]).cumsum(0)
    return int(held.max())


def test_doubling_the_images_doubles_the_peak():
    once, twice = peak_bytes(4), peak_bytes(8)
    assert 1.9 < twice / once < 2.05, (once, twice)


def test_a_layer_allocates_each_activation_once():
    bytes_per_channel = 4 * 1024 * 4  # float32, all patches
    # At attention: layer input, normalized input, q, k, v, rotated q and k
    attention = 7 * HIDDEN
    # At the MLP: layer input, input plus attention, output of fc2; output of fc1
    mlp = 3 * HIDDEN + INTERMEDIATE
    # Geometry of the batch; rope angles with sine and cosine
    others = 12 + 5 * 36
    assert max(attention, mlp) < peak_bytes(4) / bytes_per_channel < max(attention, mlp) + others + 8
