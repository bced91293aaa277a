"""Kernels that the vision tower and projector of a patched model launch for one image, beside the stock model with SDPA.

The numbers are those of docs/patching.md.
"""

import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import keye_kernels as kk

pytest.importorskip("transformers")
import transformers

from tests.helpers.launches import WAITS, GpuTensor, as_if_on_gpu, count_launches, counts
from tests.helpers.patched_families import BUILDERS, build, image

DOCUMENTATION = Path(__file__).parents[3] / "docs/patching.md"
GRID = (1, 32, 32)
DEPTH = {"keye": 27, "paddleocr_vl": 27, "qwen2_vl": 32, "qwen2_5_vl": 32, "qwen3_vl": 27}  # of the released models
TITLES = {
    "keye": "Keye's own code",
    "paddleocr_vl": "PaddleOCR-VL",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
}
if int(transformers.__version__.split(".")[0]) < 5:
    pytest.skip("the numbers are those of transformers 5", allow_module_level=True)


def encode(model: nn.Module, family: str) -> torch.Tensor:
    """The embeddings of one image of 1024 patches."""
    pixels = GpuTensor(image(family, GRID).bfloat16())
    if family == "keye":
        offsets = GpuTensor(torch.tensor([0, 1024], dtype=torch.int32))
        features = model.visual(pixels[None], image_grid_thw=[GRID], cu_seqlens=offsets)
        return torch.cat(model.mlp_AR(features, [GRID]))
    out = model.model.get_image_features(pixels, GpuTensor(torch.tensor([GRID])))
    out = getattr(out, "pooler_output", out)
    return torch.cat(list(out)) if isinstance(out, list | tuple) else out


@cache
def count(family: str, **patched: bool) -> tuple[Counter, Counter, torch.Tensor]:
    """The launches of one image, those of its last vision layer, and the embeddings."""
    model = build(family).bfloat16()
    if family != "keye":
        model.set_attn_implementation("sdpa")
    if family == "qwen2_5_vl":
        model.model.visual.fullatt_block_indexes = [0, 1]  # with windows, the stock model launches SDPA once per window
    if patched:
        kk.apply_keye_kernels(model, **patched)
    as_if_on_gpu(model)
    tower = model.visual.vision_model.encoder if family == "keye" else model.model.visual
    layer = [module for module in tower.modules() if re.search("(Block|EncoderLayer)$", type(module).__name__)][-1]
    marks = []
    layer.register_forward_pre_hook(lambda *_: marks.append(counts.copy()))
    layer.register_forward_hook(lambda *_: marks.append(counts.copy()))
    with count_launches():
        embeddings = encode(model, family).values
    first, last = marks
    return counts.copy(), last - first, embeddings


def total(launches: Counter) -> int:
    return launches.total() - launches[WAITS]


@pytest.mark.parametrize("family", BUILDERS)
def test_a_patched_tower_launches_fewer_kernels(family):
    (stock, stock_layer, expected), (patched, patched_layer, found) = count(family), count(family, elementwise=True)
    per_image = [
        total(whole) + (DEPTH[family] - 2) * total(layer) for whole, layer in ((stock, stock_layer), (patched, patched_layer))
    ]
    row = [total(stock_layer), total(patched_layer), *per_image]
    assert f"| {TITLES[family]} | {' | '.join(f'{number:,}' for number in row)} |" in DOCUMENTATION.read_text()
    assert 2 * total(patched_layer) < total(stock_layer) and not patched_layer[WAITS]
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("part", ["rope", "attention", "projector", "elementwise"])
def test_no_part_alone_launches_more(family, part):
    flags = {name: name == part for name in ("rope", "attention", "projector", "elementwise")}
    assert total(count(family, **flags)[0]) <= total(count(family)[0])


@pytest.mark.parametrize("family", BUILDERS)
def test_no_layer_fills_its_output_or_copies_what_the_kernels_can_read(family):
    _, layer, _ = count(family, elementwise=True)
    assert not {"zero fill of the output", "aten::clone", "aten::copy_", "aten::_to_copy", "aten::cat"} & layer.keys(), layer
