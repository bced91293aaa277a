"""Where the golden numbers of the official implementation lie: `../shared/golden` beside the checkout, or the part in `data`."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[3] / "shared" / "golden"
COPIED = Path(__file__).parents[1] / "data"


def golden(edition: str, name: str = "") -> Path:
    """The folder of "preview" or "v1_5", or a file of it; skips the test where it is absent."""
    for root in (SHARED, COPIED):
        path = root / edition / name
        if path.exists() and (name or root is SHARED):
            return path
    pytest.skip(f"golden data {edition}/{name} not found: put the folder at {SHARED}")
