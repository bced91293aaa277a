"""Arguments of other types, shapes and ranges end in an error that names the argument; tests/fuzz found them."""

import json

import pytest
import torch

import keye_kernels as kk
from keye_kernels.model import checkpoint
from keye_kernels.model.generation import Sampler
from keye_kernels.small import SMALL
from tests.helpers.tiny import tiny_model

IDS = torch.tensor([[1, 2, 3]])
SPARSE, META = IDS.to_sparse(), IDS.to("meta")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


WRONG_IDS = [
    (None, TypeError, "input_ids must be a tensor"),
    ([[1, 2]], TypeError, "input_ids must be a tensor"),
    (IDS[0], ValueError, r"input_ids must have shape \[B, S\]"),
    (IDS.float(), TypeError, "input_ids must be int32 or int64"),
    (IDS[:, :0], ValueError, "input_ids must hold at least one token"),
    (IDS[:0], ValueError, "input_ids must hold at least one token"),
    (SPARSE, TypeError, "input_ids must be a dense tensor"),
    (META, ValueError, "input_ids must have values"),
    (torch.tensor([[1, -1]]), ValueError, "input_ids must be from 0 to 119, got -1"),
    (torch.tensor([[1, 2**40]]), ValueError, f"input_ids must be from 0 to 119, got {2**40}"),
]


@pytest.mark.parametrize(("ids", "error", "message"), WRONG_IDS, ids=str)
def test_wrong_input_ids_are_named(model, ids, error, message):
    for call in (model, model.get_rope_index, model.generate):
        with pytest.raises(error, match=message):
            call(ids)


def test_an_id_out_of_range_is_named_in_a_decoding_step(model):
    cache = model(IDS).cache
    with pytest.raises(ValueError, match="input_ids must be from 0 to 119, got 120"):
        model(torch.tensor([[120]]), cache=cache)


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (1, TypeError),
        (IDS[0], ValueError),
        (IDS.to_sparse(), TypeError),
        (IDS * 1j, TypeError),
        (META, ValueError),
        ([[1, 1, 1]], TypeError),
    ],
    ids=str,
)
def test_wrong_masks_are_named(model, mask, error):
    for call in (model, model.get_rope_index, model.generate):
        with pytest.raises(error, match="attention_mask must"):
            call(IDS, attention_mask=mask)


def test_the_mask_of_get_rope_index_has_the_shape_of_the_ids(model):
    with pytest.raises(ValueError, match=r"attention_mask must have shape \[1, 3\], got \[1, 4\]"):
        model.get_rope_index(IDS, attention_mask=torch.ones(1, 4))


@pytest.mark.parametrize("positions", ["x", IDS, IDS.expand(3, 1, 3).float(), IDS[None].expand(3, 1, 3).to_sparse()], ids=str)
def test_wrong_positions_are_named(model, positions):
    with pytest.raises((TypeError, ValueError), match="position_ids must"):
        model(IDS, position_ids=positions)


@pytest.mark.parametrize("cache", [1, "x", ()])
def test_a_wrong_cache_is_named(model, cache):
    with pytest.raises(TypeError, match="cache must be a KVCache"):
        model(IDS, cache=cache)


@pytest.mark.parametrize(
    "pixels", ["x", None, torch.zeros(4, 3, 14, 14).to_sparse(), torch.zeros(4, 3, 14, 14, device="meta")], ids=type
)
def test_wrong_pixels_are_named(model, pixels):
    with pytest.raises(TypeError, match="pixel_values must be a dense tensor with values"):
        model.get_image_features(pixels, torch.tensor([[1, 2, 2]]))


@pytest.mark.parametrize(
    "grid", [torch.tensor([[1, 2, 2]]).to_sparse(), torch.tensor([[1, 2, 2]], device="meta")], ids=["sparse", "meta"]
)
def test_a_grid_without_values_is_named(model, grid):
    with pytest.raises(TypeError, match="grid_thw must be a dense tensor with values"):
        model.get_image_features(torch.zeros(4, 3, 14, 14), grid)


@pytest.mark.parametrize(
    "seconds", ["x", [["a"]], object(), torch.tensor([1j]), torch.ones(1, 1).to_sparse(), [2**5000]], ids=type
)
def test_wrong_seconds_are_named(model, seconds):
    with pytest.raises(ValueError, match="second_per_grid_ts must be one number per video"):
        model.get_rope_index(IDS, second_per_grid_ts=seconds)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_new_tokens": None}, TypeError, "max_new_tokens must be an integer"),
        ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens must be an integer"),
        ({"max_new_tokens": True}, TypeError, "max_new_tokens must be an integer"),
        ({"seed": "x"}, ValueError, "seed must be an integer"),
        ({"seed": 2**64}, ValueError, "seed must be an integer"),
        ({"eos_token_id": 120}, ValueError, "eos_token_id must be an integer from 0 to 119, got 120"),
        ({"eos_token_id": [3, -1]}, ValueError, "eos_token_id must be an integer from 0 to 119, got -1"),
        ({"eos_token_id": 2**64}, ValueError, "eos_token_id must be"),
        ({"streamer": 1}, TypeError, "streamer must have methods put and end"),
    ],
    ids=str,
)
def test_wrong_options_of_generate_are_named(model, options, error, message):
    with pytest.raises(error, match=message):
        model.generate(IDS, **options)


@pytest.mark.parametrize("seed", [-(2**63), 0, 2**64 - 1])
def test_all_seeds_of_torch_are_accepted(seed):
    assert Sampler(True, seed=seed)(torch.ones(1, 5)).shape == (1,)


def test_many_wrong_tensors_make_a_short_message(tmp_path):
    lines = list(checkpoint.first_of_each_kind([f"missing: a{i}" for i in range(1000)] + ["wrong shape: " + "x" * 5000]))
    assert len(lines) == checkpoint.MAX_LISTED_TENSORS + 2 and "missing: 995 more" in lines
    assert max(map(len, lines)) <= 200


def test_the_base_of_rope_may_be_a_large_integer():
    assert tiny_model(rope_theta=2**64)(IDS).logits.isfinite().all()


def test_a_long_file_name_in_the_index_is_missing(tmp_path):
    (tmp_path / "config.json").write_text((SMALL / "config.json").read_text())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "a" * 300}}))
    with pytest.raises(FileNotFoundError, match="which is missing; download the checkpoint again"):
        kk.Keye.from_pretrained(tmp_path)


def test_a_long_tensor_name_makes_a_short_message(tmp_path):
    (tmp_path / "config.json").write_text((SMALL / "config.json").read_text())
    header = json.dumps({"x" * 10**5: {"dtype": "F32", "shape": [1], "data_offsets": [0, 9]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="is not a complete safetensors file") as error:
        kk.Keye.from_pretrained(tmp_path)
    assert len(str(error.value)) < 1000
