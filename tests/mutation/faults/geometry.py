"""Faults in the geometry of a batch of images."""

from ..fault import Fault

GEOMETRY = "keye_kernels/geometry.py"
TESTS = "tests/ops/test_geometry.py"

FAULTS = [
    Fault(GEOMETRY, 'frame = by_block if order == "block" else at.flatten()', "frame = by_block", TESTS),
    Fault(GEOMETRY, "low = centre.long().clamp(max=side - 1)", "low = centre.long().clamp(max=side - 2)", TESTS),
    Fault(GEOMETRY, "        first += t * h * w", "        first += h * w", TESTS),
]
