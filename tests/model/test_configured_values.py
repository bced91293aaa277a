"""Values of the configuration and arguments of the model reach the computation that they describe."""

import json
from dataclasses import asdict

import pytest
import torch
from torch import nn

import keye_kernels as kk
from keye_kernels.model import checkpoint
from keye_kernels.model.config import LIMITS, check_number
from tests.helpers.recorded_calls import OPERATORS, operator_calls  # noqa: F401  a fixture
from tests.helpers.tiny import CONFIG, prompt, save_checkpoint, tiny_model

# docs/models/keye_vl_preview.md, "Configuration"
RELEASED = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "mrope_section": (16, 24, 24),
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "vision_start_token_id": 151652,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "eos_token_id": None,
    "pad_token_id": None,
    "torch_dtype": None,
}
RELEASED_TOWER = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 384,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
    "spatial_merge_size": 2,
    "tokens_per_second": 2,
    "rope_theta": 1e4,
}


@pytest.mark.parametrize(("model_type", "positions"), [("Keye", 40960), ("KeyeVL1_5", 131072)])
def test_defaults_are_those_of_the_released_models(model_type, positions):
    values = asdict(kk.KeyeConfig.from_dict({"model_type": model_type}))
    assert values.pop("vision_config") == RELEASED_TOWER
    assert values == {**RELEASED, "model_type": model_type, "max_position_embeddings": positions}


@pytest.mark.parametrize("name", LIMITS)
def test_limits_are_accepted_and_numbers_beyond_them_refused(name):
    low, high = LIMITS[name]
    step = 1 if isinstance(high, int) else 1e-3 * low
    for value in (low, high):
        check_number(name, value, low, high)
    for value in (low - (step or 1e-9), high + 1 if isinstance(high, int) else high * 1.01):
        with pytest.raises(ValueError, match=f"{name} must be"):
            check_number(name, value, low, high)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"attention_bias": True}, "attention_bias must be False, got True"),
        ({"use_sliding_window": True}, "use_sliding_window must be False, got True"),
        ({"vision_config": {"hidden_act": "gelu"}}, "vision_config.hidden_act must be 'gelu_pytorch_tanh', got 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "type": "mrope"}}, "rope_scaling must have type .*, got 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_scaling must have type .*, got 'linear'"),
    ],
    ids=str,
)
def test_models_that_compute_something_else_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        kk.KeyeConfig.from_dict({**CONFIG, **changes})
    accepted = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}
    assert kk.KeyeConfig.from_dict({**CONFIG, **accepted}) == kk.KeyeConfig.from_dict(CONFIG)


def test_rope_parameters_come_before_rope_scaling():
    scaling, parameters = {"rope_theta": 3.0, "mrope_section": [6, 6, 4]}, {"rope_theta": 5.0, "mrope_section": [4, 4, 8]}
    both = kk.KeyeConfig.from_dict({**CONFIG, "rope_scaling": scaling, "rope_parameters": parameters})
    assert (both.rope_theta, both.mrope_section) == (5.0, (4, 4, 8))
    old = kk.KeyeConfig.from_dict({**CONFIG, "rope_scaling": scaling, "rope_parameters": None})
    assert (old.rope_theta, old.mrope_section) == (3.0, (6, 6, 4))


def test_dtype_of_transformers_5_comes_before_torch_dtype():
    assert kk.KeyeConfig.from_dict({**CONFIG, "dtype": "float16", "torch_dtype": "float32"}).torch_dtype == "float16"


def test_every_norm_has_the_configured_eps(operator_calls):  # noqa: F811
    """The golden data does not depend on them."""
    model = tiny_model(rms_norm_eps=0.5, vision_config={**CONFIG["vision_config"], "layer_norm_eps": 0.25})
    norms = {name: m.eps for name, m in model.named_modules() if isinstance(m, (nn.RMSNorm, nn.LayerNorm))}
    assert len(norms) == 2 * 2 + 1 + 1 + 2 * 4 + 1
    for name, eps in norms.items():
        assert eps == (1e-5 if name == "mlp_AR.pre_norm" else 0.25 if name.startswith("visual.") else 0.5), name
    model(**prompt([(1, 4, 4)]))
    assert {options["eps"] for name, _, options in operator_calls if name == "rope_3d"} == {0.5}
    assert {options["eps"] for name, _, options in operator_calls if name == "patch_merge_projection"} == {1e-5}


def test_rope_has_the_configured_frequencies_and_sections(operator_calls):  # noqa: F811
    tower = {**CONFIG["vision_config"], "rope_theta": 7.0}
    scaling = {"mrope_section": [8, 4, 4]}
    model = tiny_model(rope_theta=50.0, rope_scaling=scaling, vision_config=tower)
    model(**prompt([(1, 4, 4)]))
    text, vision = ([arguments for name, arguments, _ in operator_calls if name == op] for op in ("rope_3d", "rope_2d"))
    assert len(text) == len(vision) == 2
    for *_, inv_freq, sections in text:
        torch.testing.assert_close(inv_freq, 50.0 ** -(torch.arange(16) / 16))
        assert sections == [8, 4, 4]
    for *_, inv_freq in vision:
        torch.testing.assert_close(inv_freq, 7.0 ** -(torch.arange(6) / 6))


def test_tokens_per_second_scales_the_time_of_videos():
    ids = torch.tensor([[1, 112, *[116] * 6, 113]])
    for rate in (2, 5):
        model = tiny_model(vision_config={**CONFIG["vision_config"], "tokens_per_second": rate})
        positions, _ = model.get_rope_index(ids, video_grid_thw=torch.tensor([[3, 2, 4]]), second_per_grid_ts=[1.5])
        assert positions[0, 0, 2:8].tolist() == [2 + int(frame * 1.5 * rate) for frame in (0, 0, 1, 1, 2, 2)]


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_impl_of_the_model_reaches_every_operator(tmp_path, operator_calls, impl):  # noqa: F811
    path = save_checkpoint(tiny_model(), tmp_path)
    for model in (kk.Keye(tiny_model().config, impl), kk.Keye.from_pretrained(path, impl=impl)):
        operator_calls.clear()
        model(**prompt([(1, 4, 4)]))
        assert {name: options["impl"] for name, _, options in operator_calls} == dict.fromkeys(OPERATORS, impl)
    with pytest.raises(ValueError, match="impl must be one of"):
        kk.Keye(tiny_model().config, "cuda")


def test_initial_weights():
    torch.manual_seed(0)
    model = kk.Keye(kk.KeyeConfig.from_dict({**CONFIG, "initializer_range": 0.5}))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            assert 0.45 < parameter.std() < 0.55 and abs(parameter.mean()) < 0.1, name
        else:
            assert (parameter == float("norm" in name and name.endswith("weight"))).all(), name


def test_loading_uses_the_given_dtype_and_device(tmp_path, monkeypatch):
    path = save_checkpoint(tiny_model(), tmp_path, {**CONFIG, "torch_dtype": "bfloat16"})
    allocated, allocate = [], checkpoint.allocate
    monkeypatch.setattr(
        "keye_kernels.model.keye.allocate", lambda m, *options: allocated.append(options) or allocate(m, *options)
    )
    kk.Keye.from_pretrained(path, dtype="float16", device="cpu:0")
    kk.Keye.from_pretrained(path)
    assert allocated == [(torch.float16, torch.device("cpu:0")), (torch.bfloat16, torch.device("cpu"))]
    with torch.device("meta"), pytest.raises(ValueError, match="device must be available, got 'meta'"):
        kk.Keye.from_pretrained(path)


def test_the_output_layer_of_a_tied_checkpoint_may_be_stored(tmp_path):
    """Only then: an untied model needs its own."""
    model = tiny_model(tie_word_embeddings=True)
    stored = {"lm_head.weight": torch.zeros(120, 64)}
    tied = kk.Keye.from_pretrained(save_checkpoint(model, tmp_path, {**CONFIG, "tie_word_embeddings": True}, **stored))
    assert torch.equal(tied.lm_head.weight, model.lm_head.weight) and tied.lm_head.weight is tied.model.embed_tokens.weight
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert not kk.Keye.from_pretrained(tmp_path).lm_head.weight.any()
    save_checkpoint(model, tmp_path)
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
        kk.Keye.from_pretrained(tmp_path)


def test_the_progress_bar_counts_the_bytes_of_the_parameters(tmp_path, monkeypatch):
    bars = []

    class Bar(checkpoint.tqdm):
        def close(self):
            bars.append((self.disable, self.total, self.n))
            super().close()

    monkeypatch.setattr(checkpoint, "tqdm", Bar)
    model = kk.Keye.from_pretrained(save_checkpoint(tiny_model(), tmp_path), dtype="bfloat16", progress=True)
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert bars[0] == (False, size, size)
    kk.Keye.from_pretrained(tmp_path)
    assert bars[-1][0] is True


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.pt"])
def test_pickled_weights_are_named(tmp_path, name):
    path = save_checkpoint(tiny_model(), tmp_path)
    (path / "model.safetensors").rename(path / name)
    with pytest.raises(ValueError, match="pickled weights"):
        kk.Keye.from_pretrained(path)
