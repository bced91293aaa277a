"""Every recorded number of the official Preview code. Tolerances: tests/golden/preview/README.md."""

import dataclasses

import pytest
import torch

import keye_kernels as kk
from keye_kernels.geometry import VisionBatch
from keye_kernels.model.positions import rope_index
from keye_kernels.segments import Segments
from tests.helpers.golden import PREVIEW_CASES, golden, load_case, load_golden, token_mask
from tests.helpers.stages import record_stages

TOLERANCES = {
    "image.patch_embeds": 1e-5,
    "image.layer0": 3e-5,
    "image.post_ln": 1e-5,
    "image.projector": 1e-5,
    "video.patch_embeds": 1e-5,
    "video.layer0": 3e-5,
    "video.post_ln": 1e-5,
    "video.projector": 1e-5,
    "inputs_embeds": 1e-5,
    "text_layer0": 3e-5,
    "final_hidden": 1e-4,
    "logits": 1e-4,
}
GENERATED_LOGITS_TOLERANCE = 2e-4
# Largest and mean deviation of the official implementation when it runs in bfloat16
OFFICIAL_BFLOAT16_ERROR = {"post_ln": (0.009, 0.0008), "projector": (0.006, 0.0009), "logits": (0.18, 0.022)}


@pytest.fixture(scope="module")
def model():
    return kk.Keye.from_pretrained(golden("preview"), dtype=torch.float32)


@pytest.mark.parametrize("name", PREVIEW_CASES)
def test_every_stage_matches_the_official_code(model, name):
    inputs, outputs = load_case("preview", name)
    stages = record_stages(model, inputs)
    mask = token_mask(inputs)
    compared = [stage for stage in TOLERANCES if stage in outputs]
    assert set(compared) <= stages.keys() and len(compared) >= 4
    for stage in compared:
        expected, found = outputs[stage], stages[stage]
        if stage in ("text_layer0", "final_hidden", "logits"):
            expected, found = expected[mask], found[mask]
        torch.testing.assert_close(
            found, expected, atol=TOLERANCES[stage], rtol=0, msg=lambda text, stage=stage: f"{stage}: {text}"
        )


@pytest.mark.parametrize("name", PREVIEW_CASES)
def test_positions_are_exact(model, name):
    inputs, outputs = load_case("preview", name)
    inputs = {key: value for key, value in inputs.items() if not key.startswith("pixel_values")}
    position_ids, rope_deltas = model.get_rope_index(**inputs)
    assert torch.equal(position_ids, outputs["position_ids"])
    assert torch.equal(rope_deltas, outputs["rope_deltas"])


def rope_index_cases():
    tensors = load_golden("preview", "case_rope_index.safetensors")
    names = sorted({key.partition(".")[0] for key in tensors})
    assert len(names) == 17
    return {name: {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(name + ".")} for name in names}


def test_rope_index_cases_are_exact():
    config = kk.KeyeConfig.from_pretrained(golden("preview"))
    optional = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "attention_mask")
    for name, case in rope_index_cases().items():
        position_ids, rope_deltas = rope_index(config, case["input_ids"], *(case.get(key) for key in optional))
        assert torch.equal(position_ids, case["position_ids"]), name
        assert torch.equal(rope_deltas, case["rope_deltas"]), name


@pytest.mark.parametrize("name", PREVIEW_CASES)
def test_greedy_tokens_are_exact(model, name):
    inputs, outputs = load_case("preview", name)
    tokens = model.generate(**inputs, max_new_tokens=16, eos_token_id=())
    length = inputs["input_ids"].shape[1]
    assert torch.equal(tokens[:, :length], inputs["input_ids"])
    assert torch.equal(tokens[:, length:], outputs["generated"])


@pytest.mark.parametrize("name", PREVIEW_CASES)
def test_logits_of_every_decoding_step(model, name):
    inputs, outputs = load_case("preview", name)
    with torch.no_grad():
        output = model(**inputs, logits_to_keep=1)
        for step, token in enumerate(outputs["generated"].unbind(1)):
            expected = outputs["generated_logits"][:, step]
            torch.testing.assert_close(output.logits[:, -1], expected, atol=GENERATED_LOGITS_TOLERANCE, rtol=0)
            output = model(token[:, None], cache=output.cache)


def test_window_attention_of_the_official_tower(model):
    """Released models use no windows. The tower computes them from a batch in window order, one segment per window."""
    case = load_golden("preview", "case_g_window_4.safetensors")
    order, offsets = case["window_index"], case["cu_seqlens_window"]
    tower, patches = model.visual, case["pixel_values"]
    raster = VisionBatch.build(case["image_grid_thw"], len(patches), table_side=tower.config.table_side, order="raster")
    assert torch.equal(raster.segments.cu_seqlens, case["cu_seqlens"])
    windows = dataclasses.replace(
        raster,
        segments=Segments.from_lengths(offsets.diff().tolist(), offsets.device),
        position_ids=raster.position_ids[:, order],
        corner_index=raster.corner_index[order],
        corner_weight=raster.corner_weight[order],
        raster_index=order,
    )
    found = {}
    hook = tower.layers[0].register_forward_hook(lambda module, args, output: found.update(patch_embeds=args[0], layer0=output))
    with torch.no_grad():
        found["post_ln"] = tower(patches, windows)
    hook.remove()
    for stage, output in found.items():
        tolerance = TOLERANCES[f"image.{stage}"]
        torch.testing.assert_close(output, case[stage][order], atol=tolerance, rtol=0)


def test_bfloat16_errors_are_those_of_the_official_code():
    """At most twice its largest and 1.5 times its mean deviation."""
    model = kk.Keye.from_pretrained(golden("preview"), dtype=torch.bfloat16)
    for name in PREVIEW_CASES:
        inputs, outputs = load_case("preview", name)
        mask = token_mask(inputs)
        stages = record_stages(model, inputs)
        for stage, (largest, mean) in OFFICIAL_BFLOAT16_ERROR.items():
            for key in (k for k in outputs if k.rpartition(".")[2] == stage):
                error = (stages[key].float() - outputs[key]).abs()
                error = error[mask] if key == "logits" else error
                assert error.max() < 2 * largest and error.mean() < 1.5 * mean, (name, key, error.max(), error.mean())
