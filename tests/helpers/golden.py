"""Loads the golden data in tests/golden: inputs and outputs of the official implementation (see the READMEs there)."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
PREVIEW_CASES = (
    "a_one_image",
    "b_two_images",
    "c_batch_left_pad",
    "d1_video_ts_0_5",
    "d2_video_ts_0_75",
    "d3_two_videos",
    "e_image_video_mixed",
    "f1_text_only",
    "f2_text_only_left_pad",
)
V1_5_CASES = (
    "batch_left_padded",
    "image_then_two_videos",
    "image_upsampled_posemb",
    "text_only_left_padded",
    "two_images",
    "video_all_slow_no_timestamps",
    "video_slow_fast",
)
CASES = [("preview", name) for name in PREVIEW_CASES] + [("v1_5", name) for name in V1_5_CASES]
LOGITS_TOLERANCE = {"preview": 1e-4, "v1_5": 1e-3}  # absolute, float32
INPUTS = (
    "input_ids",
    "attention_mask",
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
    "second_per_grid_ts",
)


def golden(edition: str, name: str = "") -> Path:
    """Returns the folder of an edition, "preview" or "v1_5", or the path of a file in it."""
    path = GOLDEN / edition / name
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: the checkout is incomplete")
    return path


def load_golden(edition: str, name: str) -> dict[str, Tensor]:
    """Loads a safetensors file and restores the recorded dtypes from the narrower stored ones.

    int16 becomes int64. `*pixel_values*` stored as uint8 are indices into the file's `pixel_levels`, which has the float32
    value of each gray level.
    """
    tensors = load_file(golden(edition, name))
    levels = tensors.pop("pixel_levels", None)
    for key, tensor in tensors.items():
        if tensor.dtype == torch.int16:
            tensors[key] = tensor.long()
        elif tensor.dtype == torch.uint8 and "pixel_values" in key:
            tensors[key] = levels[tensor.long()]
    return tensors


def load_case(edition: str, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Loads one case of the whole model.

    Returns:
        inputs: keyword arguments of the model, floating-point ones in float32.
        outputs: the recorded tensors. In both editions `logits` [B, S, V], `position_ids` [3, B, S], `rope_deltas` [B, 1]
            and the greedy tokens `generated` [B, steps]; the other names are those of the edition's README.
    """
    if edition == "preview":
        tensors = load_golden(edition, f"case_{name}.safetensors")
        inputs = {key: tensors.pop(key) for key in INPUTS if key in tensors}
        return inputs, tensors
    tensors = load_golden(edition, "cases.safetensors")
    inputs, outputs = (
        {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        for prefix in (f"{name}.in.", f"{name}.out.")
    )
    if not inputs:
        raise ValueError(f"name must be a case of cases.safetensors, got {name!r}")
    inputs = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in inputs.items()}
    if "greedy_tokens" in outputs:
        outputs["generated"] = outputs.pop("greedy_tokens")
    return inputs, outputs


def token_mask(inputs: dict[str, Tensor]) -> Tensor:
    """[B, S] bool: False at padding."""
    return inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()


def load_projector_case(size: Literal["tiny", "real"]) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Loads a projector case.

    Returns:
        features [N, Dv], grid_thw [3, 3], the six float32 weights in the order of `patch_merge_projection`, and the expected
        output [N/4, Dt] in float64.
    """
    case = load_golden("preview", f"kernel_projector_{size}.safetensors")
    names = [f"{layer}.{kind}" for layer in ("pre_norm", "linear_1", "linear_2") for kind in ("weight", "bias")]
    if size == "tiny":
        model = load_golden("preview", "model.safetensors")
        weights = [model[f"mlp_AR.{name}"].float() for name in names]
    else:
        weights = _real_projector_weights()
        for name, weight in zip(names, weights, strict=True):
            ends = torch.cat((weight.flatten()[:4], weight.flatten()[-4:]))
            if not torch.equal(ends, case[f"check.{name}"]):
                raise ValueError(f"{name}: the weight formula does not give the recorded values")
    return case["features"], case["grid_thw"], weights, case["out_f64"]


def _real_projector_weights() -> list[Tensor]:
    return [
        _formula_weight(1, 1, 1152, 1.0)[0] + 1,
        _formula_weight(2, 1, 1152, 0.5)[0],
        _formula_weight(3, 4608, 4608, 2**-4),
        _formula_weight(4, 1, 4608, 0.5)[0],
        _formula_weight(5, 4096, 4608, 2**-4),
        _formula_weight(6, 1, 4096, 0.5)[0],
    ]


def _formula_weight(stream: int, rows: int, columns: int, scale: float) -> Tensor:
    """The pseudo-random weights of tests/golden/preview/README.md, exact in float32."""
    n = np.arange(rows * columns, dtype=np.uint64) + (np.uint64(stream) << np.uint64(40))
    with np.errstate(over="ignore"):
        z = (n + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    u = (z >> np.uint64(40)).astype(np.float64) / 2**24 - 0.5
    return torch.from_numpy((u * scale).astype(np.float32).reshape(rows, columns))
