"""Memory of the vision path is linear in patches. The peak of one pass, in a process of its own."""

import subprocess
import sys

CODE = """
import resource, sys, torch
sys.path.insert(0, ".")
import keye_kernels as kk
from keye_kernels.model.vision import VisionTower
from keye_kernels.model.config import VisionConfig
torch.set_num_threads(1)
config = VisionConfig(hidden_size=144, intermediate_size=304, num_hidden_layers=2, num_attention_heads=2)
tower = VisionTower(config, False, "reference")
grid = torch.tensor([[1, 32, 32]] * int(sys.argv[1]))

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

with torch.no_grad():
    small = torch.zeros(16, 3, 14, 14)
    tower(small, tower.geometry(torch.tensor([[1, 4, 4]]), 16))  # what the libraries need once
    patches = int(grid.prod(1).sum())
    before, earlier = status("VmRSS"), status("VmHWM")
    out = tower(torch.zeros(patches, 3, 14, 14), tower.geometry(grid, patches))
    assert out.shape == (patches, 144)
assert status("VmHWM") > earlier, "the peak is still that of the imports: take more patches"
print(status("VmHWM") - before)
"""


def peak(images):
    result = subprocess.run([sys.executable, "-c", CODE, str(images)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


def test_doubling_the_images_doubles_the_peak():
    """32,768 patches in 32 images, then 64 images."""
    once, twice = peak(32), peak(64)
    assert 1.8 < twice / once < 2.2, (once, twice)
