"""uint8 patches: normalization is folded into the patch embedding."""

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import keye_kernels as kk
from keye_kernels.model import vision
from keye_kernels.pixel_norm import PixelNorm
from tests.helpers.gpu_copies import Copies
from tests.helpers.tiny import prompt, save_checkpoint, tiny_model

NORMS = [PixelNorm(), PixelNorm((0.48, 0.46, 0.41), (0.27, 0.26, 0.28), 1 / 255)]


@pytest.mark.parametrize("norm", NORMS, ids=["half", "clip"])
def test_uint8_patches_give_the_features_of_normalized_patches(norm):
    model = tiny_model()
    model.visual.pixel_norm = norm
    inputs = prompt([(1, 6, 8)])
    gray = torch.randint(0, 256, inputs["pixel_values"].shape, dtype=torch.uint8)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in norm[:2])
    normalized = (gray.float() / 255 - mean) / std
    with torch.no_grad():
        expected = model.get_image_features(normalized, inputs["image_grid_thw"])
        found = model.get_image_features(gray, inputs["image_grid_thw"])
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
        exact = model.double().get_image_features(normalized.double(), inputs["image_grid_thw"])
        half = model.bfloat16()
        error = {
            name: (half.get_image_features(pixels, inputs["image_grid_thw"]).double() - exact).norm() / exact.norm()
            for name, pixels in (("uint8", gray), ("normalized", normalized.bfloat16()))
        }
        assert error["uint8"] < 1.5 * error["normalized"], error


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int8, torch.bool, torch.complex64])
def test_patches_of_other_dtypes_are_refused(dtype):
    inputs = prompt([(1, 4, 6)])
    with pytest.raises(TypeError, match=rf"pixel_values must be normalized floats or uint8, got {dtype}"):
        tiny_model()(**inputs | {"pixel_values": inputs["pixel_values"].to(dtype)})


def test_normalization_is_read_from_the_checkpoint(tmp_path):
    path = save_checkpoint(tiny_model(), tmp_path)
    assert kk.Keye.from_pretrained(path).visual.pixel_norm == PixelNorm()
    values = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 2.0, 4.0], "rescale_factor": 0.5}
    (path / "preprocessor_config.json").write_text(json.dumps(values))
    assert kk.Keye.from_pretrained(path).visual.pixel_norm == PixelNorm((0.1, 0.2, 0.3), (1.0, 2.0, 4.0), 0.5)


def gray_patches():
    inputs = prompt([(1, 6, 8)])
    return torch.randint(0, 256, inputs["pixel_values"].shape, dtype=torch.uint8), inputs["image_grid_thw"]


def changed_in_place(model):
    with torch.no_grad():
        model.visual.patch_embedding.weight.mul_(-0.5)
        model.visual.patch_embedding.bias.add_(1)


def replaced(model):
    weight = model.visual.patch_embedding.weight
    model.visual.patch_embedding.weight = torch.nn.Parameter(weight.detach() * -2)


def new_data(model):
    model.visual.patch_embedding.weight.data = torch.rand_like(model.visual.patch_embedding.weight)


def cast(model):
    model.half().float()


def other_norm(model):
    model.visual.pixel_norm = NORMS[1]


@pytest.mark.parametrize("change", [changed_in_place, replaced, new_data, cast, other_norm])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_changed_weights_take_effect_for_uint8_patches(change, mode):
    model, (gray, grids) = tiny_model(), gray_patches()
    with mode():
        before = model.get_image_features(gray, grids)
        change(model)
        norm = model.visual.pixel_norm
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in norm[:2])
        expected = model.get_image_features((gray.float() / 255 - mean) / std, grids)
        found = model.get_image_features(gray, grids)
    assert change is cast or not torch.allclose(found, before, atol=1e-3)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def test_uint8_patches_make_no_tensor_on_the_host_after_the_first_call(monkeypatch):
    """In a CUDA graph, and between launches, a copy from the host would wait."""
    tower, (gray, _) = tiny_model().visual, gray_patches()
    with torch.no_grad():
        expected = tower._embed_patches(gray)
        monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("made a tensor from numbers"))
        for name in ("tolist", "item", "cpu", "__bool__"):
            monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("read a tensor"))
        found = tower._embed_patches(gray)
    monkeypatch.undo()
    assert torch.equal(found, expected)


def test_tensors_of_fake_and_inference_mode_do_not_enter_the_cache():
    scale, shift = vision.pixel_scale_and_shift(NORMS[1], 196, torch.device("cpu"))
    vision._cached_scale_and_shift.cache_clear()
    with FakeTensorMode():
        assert isinstance(vision.pixel_scale_and_shift(NORMS[1], 196, torch.device("cpu"))[0], FakeTensor)
    model, (gray, grids) = tiny_model(), gray_patches()
    with torch.inference_mode():
        found = vision.pixel_scale_and_shift(NORMS[1], 196, torch.device("cpu"))
        model.get_image_features(gray, grids)
    assert type(found[0]) is torch.Tensor and torch.equal(found[0], scale) and torch.equal(found[1], shift)
    model.get_image_features(gray, grids).sum().backward()
    weight = model.visual.patch_embedding.weight.grad.clone()
    model.zero_grad()
    model.get_image_features((gray.float() / 255 - 0.5) / 0.5, grids).sum().backward()
    torch.testing.assert_close(weight, model.visual.patch_embedding.weight.grad, atol=1e-3, rtol=1e-3)


def test_pixels_are_copied_to_the_gpu_asynchronously(monkeypatch):
    model, (gray, grids) = tiny_model(), gray_patches()
    with torch.no_grad():
        expected = model.get_image_features(gray, grids)
        copies = Copies(monkeypatch)
        found = model.get_image_features(gray, grids)
    assert [tensor.dtype for tensor, _ in copies.copied] == [torch.uint8] * 2  # pixels and geometry
    assert copies.all_asynchronous()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("edition", ["Keye", "KeyeVL1_5"])
def test_a_prompt_with_images_copies_nothing_from_pageable_memory(monkeypatch, edition):
    model, inputs = tiny_model(model_type=edition), prompt([(1, 4, 6), (1, 2, 4)])
    with torch.no_grad():
        expected = model(**inputs).logits
        copies = Copies(monkeypatch)
        found = model(**inputs).logits
    assert copies.all_asynchronous() and torch.equal(found, expected)
