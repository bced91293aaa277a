"""What the kernels meet in use: images, frames, prompts and decode batches, and the launches that follow from them.

A file for `--shapes` is JSON in the form of SETS, any of its four fields:

    {"images": [[4, 1024]], "frames": [[64, 192]], "prompts": [[1, 4096]], "decode": [1, 64]}

4 images of 1024 patches each in one batch, 64 frames of 192 patches, one prompt of 4096 tokens, decoding 1 and 64 rows.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# In this order: the projector's launch ends in a `linear`, whose tile is then known.
KERNELS = ("rope", "position_embedding_2d", "varlen_attention", "linear", "patch_merge")
MERGED = 4  # patches that the projector joins into one row

SETS: dict[str, dict[str, list]] = {
    "keye-8b": {
        "images": [[1, 256], [16, 256], [1, 512], [1, 1024], [8, 1024], [64, 1024], [4, 2048], [16, 2304], [1, 5120], [64, 5120]],
        "frames": [[64, 192], [32, 3072]],
        "prompts": [[1, 16], [1, 128], [1, 1024], [8, 1024], [1, 4096], [1, 32768]],
        "decode": [1, 8, 64, 256],
    },
    "small": {"images": [[1, 256], [4, 1024]], "frames": [[8, 192]], "prompts": [[1, 1024]], "decode": [1, 64]},
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """One launch to tune for: `count` segments of `size` rows each.

    `part` is "vision" or "text"; of the projector the order of the patches, "raster" or "block".
    """

    kernel: str
    part: str
    count: int
    size: int

    @property
    def total(self) -> int:
        return self.count * self.size

    def __str__(self) -> str:
        return f"{self.kernel}, {self.part}, {self.count} x {self.size}"


def load_shapes(name: str, kernels: tuple[str, ...] = KERNELS) -> list[Shape]:
    """The shapes of a named set or of a file, those of a kernel together, each once.

    Raises ValueError for what is neither, and for a file that is not in the form above; it names what is known.
    """
    uses = SETS[name] if name in SETS else _read(name)
    shapes: dict[tuple, Shape] = {}
    for kernel in kernels:
        for shape in _launches(kernel, uses):
            # Only attention tells segments apart; the other kernels see their sum, in powers of two
            load = (shape.count, shape.size) if kernel == "varlen_attention" else (shape.total - 1).bit_length()
            shapes.setdefault((kernel, shape.part, load), shape)
    return list(shapes.values())


def _launches(kernel: str, uses: dict[str, list]) -> list[Shape]:
    vision = [*uses.get("images", []), *uses.get("frames", [])]
    text = uses.get("prompts", [])
    if kernel == "rope":
        rows = [[1, batch] for batch in uses.get("decode", [])]
        return [Shape(kernel, "text", *use) for use in [*rows, *text]] + [
            Shape(kernel, "vision", *use) for use in vision
        ]
    if kernel == "varlen_attention":  # decoding attends to its cache without this kernel
        return [Shape(kernel, "vision", *use) for use in vision] + [Shape(kernel, "text", *use) for use in text]
    if kernel == "position_embedding_2d":
        return [Shape(kernel, "vision", *use) for use in vision]
    merged = [(count, size // MERGED) for count, size in vision]
    if kernel == "linear":
        return [Shape(kernel, "block", *use) for use in merged]
    return [Shape(kernel, order, *use) for order in ("block", "raster") for use in merged]


def _read(name: str) -> dict[str, Any]:
    known = f"--shapes takes {', '.join(SETS)} or a JSON file"
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"{known}; there is no file {name!r}")
    try:
        uses = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{known}; {name} is no JSON: {error}") from None
    fields = SETS["keye-8b"]
    form = f"{name} must hold an object such as {json.dumps(SETS['small'])}"
    if not isinstance(uses, dict) or not uses or uses.keys() - fields.keys():
        raise ValueError(form)
    for field, values in uses.items():
        if not isinstance(values, list):
            raise ValueError(f"{form}; {field} is {values!r}")
        for value in values:
            numbers = [value] if field == "decode" else value
            well_formed = isinstance(numbers, list) and len(numbers) == (1 if field == "decode" else 2)
            if not well_formed or not all(type(number) is int and number > 0 for number in numbers):
                raise ValueError(f"{form}; {field} has {value!r}")
            if field in ("images", "frames") and numbers[1] % MERGED:
                raise ValueError(f"{form}; the patches of {field} must come in fours, got {value!r}")
    return uses
