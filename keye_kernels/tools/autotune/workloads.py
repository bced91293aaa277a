"""What to tune for: images, frames, prompts and decode batches. Each `KernelSpec` derives its launches from them.

A file for `--shapes` is a JSON object like those in WORKLOADS, with any of the four fields:

    {"images": [[4, 1024]], "frames": [[64, 192]], "prompts": [[1, 4096]], "decode": [1, 64]}

4 images of 1024 patches each in one batch, 64 frames of 192 patches, one prompt of 4096 tokens, decoding with batch sizes 1
and 64.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from keye_kernels.triton.registry import kernel_spec

if TYPE_CHECKING:
    from keye_kernels.triton.spec import TuningShape, Workload

PATCHES_PER_TOKEN = 4  # merged by the projector

WORKLOADS: "dict[str, Workload]" = {
    "keye-8b": {
        "images": [[1, 256], [16, 256], [1, 512], [1, 1024], [8, 1024], [64, 1024], [4, 2048], [16, 2304], [1, 5120], [64, 5120]],
        "frames": [[64, 192], [32, 3072]],
        "prompts": [[1, 16], [1, 128], [1, 1024], [8, 1024], [1, 4096], [1, 32768]],
        "decode": [1, 2, 4, 8, 16, 64, 256],
    },
    "small": {"images": [[1, 256], [4, 1024]], "frames": [[8, 192]], "prompts": [[1, 1024]], "decode": [1, 64]},
}  # fmt: skip


def load_shapes(name: str, kernels: tuple[str, ...]) -> "list[TuningShape]":
    """The shapes of a named workload or of a file, kernel by kernel, each once.

    Raises ValueError, with the known names, if `name` is neither, or if the file does not have the form above.
    """
    workload = WORKLOADS[name] if name in WORKLOADS else _read(name)
    shapes: dict[tuple, TuningShape] = {}
    for kernel in kernels:
        spec = kernel_spec(kernel)
        for shape in spec.shapes(workload):
            # Attention depends on the segment lengths. The other kernels see the total, rounded up to a power of two
            size = (shape.count, shape.size) if kernel == "varlen_attention" else (shape.total - 1).bit_length()
            shapes.setdefault((kernel, shape.part, size), shape)
    return list(shapes.values())


def _read(name: str) -> "Workload":
    known = f"--shapes must be {', '.join(WORKLOADS)} or a JSON file"
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"{known}; there is no file {name!r}")
    try:
        workload = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{known}; {name} is not valid JSON: {error}") from None
    fields = WORKLOADS["keye-8b"]
    form = f"{name} must hold an object such as {json.dumps(WORKLOADS['small'])}"
    if not isinstance(workload, dict) or not workload or workload.keys() - fields.keys():
        raise ValueError(form)
    for field, values in workload.items():
        if not isinstance(values, list):
            raise ValueError(f"{form}; got {values!r} for {field}")
        for value in values:
            numbers = [value] if field == "decode" else value
            well_formed = isinstance(numbers, list) and len(numbers) == (1 if field == "decode" else 2)
            if not well_formed or not all(type(number) is int and number > 0 for number in numbers):
                raise ValueError(f"{form}; got {value!r} in {field}")
            if field in ("images", "frames") and numbers[1] % PATCHES_PER_TOKEN:
                raise ValueError(f"{form}; the patches of {field} must be a multiple of 4, got {value!r}")
    return workload
