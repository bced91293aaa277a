"""The numbers in docs/limits.md are those of the code."""

import re
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

from keye_kernels.model.config import LIMITS
from keye_kernels.processing.sources import _HttpRedirectsOnly
from keye_kernels.processing.video_reader import CONTAINERS, _max_frame_pixels

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "limits.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]
UNITS = {" s": "", " pixels": "", " MiB": " * 2**20", " GiB": " * 2**30"}
CONSTANTS = {row[2].strip("`"): row[1] for row in ROWS if len(row) == 3 and "." in row[2] and row[2].startswith("`")}
# Constants with a limit that the page has to list
MODULES = (
    "processing.sources",
    "processing.videos",
    "processing.video_reader",
    "processing.templates",
    "processing.resize",
    "processing.sampling",
    "processing.threads",
)
NOT_LIMITS = ("MAX_ROUNDING_TICKS", "MAX_MISSING_SECONDS", "MAX_FPS_ERROR", "MAX_PRECISION")


def number(text):
    for unit, factor in UNITS.items():
        text = re.sub(f"{unit}$", factor, text)
    return eval(text.replace(",", ""))


@pytest.mark.parametrize("constant", CONSTANTS)
def test_the_documented_number_is_that_of_the_code(constant):
    factor, _, name = constant.rpartition(" * ")
    module, _, attribute = name.rpartition(".")
    assert number(CONSTANTS[constant]) == (int(factor) if factor else 1) * getattr(import_module(module), attribute)


@pytest.mark.parametrize("module", MODULES)
def test_all_limits_are_documented(module):
    names = [name for name in vars(import_module(f"keye_kernels.{module}")) if name.startswith("MAX_") and name not in NOT_LIMITS]
    assert names
    for name in names:
        assert re.search(rf"\b{name}\b", PAGE), f"docs/limits.md has no {name}"


def test_limits_of_config_json():
    bounds = [row for row in ROWS if len(row) == 3 and row[1][0].isdigit() and row[2][0].isdigit()]
    documented = {name.strip("` "): (number(low), number(high)) for names, low, high in bounds for name in names.split(",")}
    assert documented == LIMITS


def test_container_formats():
    listed = re.search(r"raw streams (.*?) \(FFmpeg", PAGE, re.DOTALL)[1]
    assert re.findall(r"\w+", listed.replace(" and ", " ")) == list(CONTAINERS)


def test_limits_of_other_packages():
    assert _HttpRedirectsOnly.max_redirections == number(CONSTANTS["keye_kernels.processing.sources.MAX_REDIRECTS"])
    assert _max_frame_pixels() == 2 * Image.MAX_IMAGE_PIXELS
