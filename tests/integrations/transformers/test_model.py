"""The transformers interface: loading, saving, caches, beams, padding, embeddings, attention, errors."""

import copy
import json

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import keye_kernels as kk
from keye_kernels.editions import EDITIONS
from keye_kernels.integrations.transformers.modeling import MODELS
from keye_kernels.integrations.transformers.vision import PatchEmbedding
from tests.helpers.auto_model import load
from tests.helpers.tiny import CONFIG, prompt, save_checkpoint, tiny_model

GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}


def two_prompts():
    """Returns two prompts, the first with one image and the second with two, and a left-padded batch of both."""
    prompts = [prompt([(1, 4, 6)]), prompt([(1, 4, 4), (1, 2, 6)], seed=1)]
    length = max(single["input_ids"].shape[1] for single in prompts)
    pads = [length - single["input_ids"].shape[1] for single in prompts]
    assert max(pads) > 0
    pad = torch.nn.functional.pad
    batch = {
        "input_ids": torch.cat([pad(single["input_ids"], (n, 0)) for single, n in zip(prompts, pads, strict=True)]),
        "attention_mask": torch.cat(
            [pad(torch.ones_like(single["input_ids"]), (n, 0)) for single, n in zip(prompts, pads, strict=True)]
        ),
        "pixel_values": torch.cat([single["pixel_values"] for single in prompts]),
        "image_grid_thw": torch.cat([single["image_grid_thw"] for single in prompts]),
    }
    return prompts, batch


def new_tokens(model, inputs, **options):
    return model.generate(**inputs, **{**GREEDY, **options})[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
def test_auto_classes_load_the_model(tiny_folder, auto):
    model = auto.from_pretrained(tiny_folder)
    assert type(model).__name__ == "KeyeForConditionalGeneration"
    assert model.dtype == torch.float32 and not model.training


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtype_and_torch_dtype_set_the_dtype(tiny_folder, name):
    assert AutoModel.from_pretrained(tiny_folder, **{name: torch.bfloat16}).dtype == torch.bfloat16


def test_loading_equals_direct_construction(tiny, tiny_folder):
    """Loading uses the meta device, which would leave buffers uninitialized."""
    built = type(tiny)(AutoConfig.from_pretrained(tiny_folder)).eval()
    built.load_state_dict(tiny.state_dict())
    assert not list(tiny.buffers())
    inputs = prompt([(1, 4, 6)])
    assert torch.equal(built(**inputs).logits, tiny(**inputs).logits)


def test_logits_match_the_lean_model(tiny, tiny_folder):
    inputs = prompt([(1, 4, 6), (2, 4, 4)])
    expected = kk.Keye.from_pretrained(tiny_folder)(**inputs).logits
    torch.testing.assert_close(tiny(**inputs).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_saving_and_loading_is_exact(tmp_path, tied):
    config = {**CONFIG, "tie_word_embeddings": tied}
    drop = {"lm_head.weight": None} if tied else {}
    model = load(save_checkpoint(tiny_model(tie_word_embeddings=tied), tmp_path / "first", config, **drop))
    model.save_pretrained(tmp_path / "second", max_shard_size="200KB")
    assert len(list((tmp_path / "second").glob("*.safetensors"))) > 1
    again = load(tmp_path / "second")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert again.config.lean() == model.config.lean()
    inputs = prompt([(1, 4, 6)])
    lean = kk.Keye.from_pretrained(tmp_path / "second")
    assert torch.equal(lean.generate(**inputs, max_new_tokens=6, eos_token_id=()), model.generate(**inputs, **GREEDY))


def test_parameter_names_match_the_checkpoint(tiny, tiny_folder):
    from keye_kernels.model.checkpoint import destinations

    official = destinations(kk.Keye.from_pretrained(tiny_folder))
    assert {n: list(p.shape) for n, p in tiny.state_dict().items()} == {n: list(v.shape) for n, v in official.items()}


def test_device_map_and_offloading_keep_the_logits(tiny, tiny_folder, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate")
    inputs = prompt([(1, 4, 6)])
    expected = tiny(**inputs).logits
    assert torch.equal(load(tiny_folder, device_map="auto")(**inputs).logits, expected)
    places = {"visual": "disk", "mlp_AR": "disk", "model": "disk", "lm_head": "cpu"}
    offloaded = load(tiny_folder, device_map=places, offload_folder=tmp_path)
    assert offloaded.mlp_AR.linear_1.weight.is_meta and offloaded.model.layers[0].self_attn.q_norm.weight.is_meta
    torch.testing.assert_close(offloaded(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


def test_tokens_do_not_depend_on_the_cache(tiny):
    _, batch = two_prompts()
    expected = new_tokens(tiny, batch)
    assert torch.equal(new_tokens(tiny, batch, cache_implementation="static"), expected)
    assert torch.equal(new_tokens(tiny, batch, use_cache=False), expected)


def test_tokens_do_not_depend_on_left_padding(tiny):
    prompts, batch = two_prompts()
    alone = torch.cat([new_tokens(tiny, single) for single in prompts])
    assert torch.equal(new_tokens(tiny, batch), alone)


def test_beams_use_the_images_of_their_sequence(tiny):
    prompts, batch = two_prompts()
    alone = torch.cat([new_tokens(tiny, single, num_beams=3) for single in prompts])
    assert torch.equal(new_tokens(tiny, batch, num_beams=3), alone)
    other = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
    assert not torch.equal(new_tokens(tiny, other, num_beams=3), alone)


def test_beams_use_the_videos_of_their_sequence(tiny):
    """Two videos with different second_per_grid_ts, so that their rope_deltas differ."""
    prompts, _ = two_prompts()
    videos = []
    for single, seconds in zip(prompts[:1] * 2, (0.5, 3.0), strict=True):
        ids = single["input_ids"].masked_fill(single["input_ids"] == 115, 116)
        patches = single["pixel_values"]
        videos.append(
            {
                "input_ids": ids,
                "pixel_values_videos": patches,
                "video_grid_thw": torch.tensor([[3, 2, 4]]),
                "second_per_grid_ts": torch.tensor([seconds]),
            }
        )
    batch = {name: torch.cat([video[name] for video in videos]) for name in videos[0]}
    alone = torch.cat([new_tokens(tiny, video, num_beams=2) for video in videos])
    assert torch.equal(new_tokens(tiny, batch, num_beams=2), alone)


def test_samples_use_the_images_of_their_sequence(tiny):
    torch.manual_seed(0)
    _, batch = two_prompts()
    tokens = new_tokens(tiny, batch, do_sample=True, num_return_sequences=3, top_k=1)
    assert torch.equal(tokens, new_tokens(tiny, batch).repeat_interleave(3, dim=0))


def test_streamer_receives_the_tokens(tiny):
    class Streamer:
        def __init__(self):
            self.values = []

        def put(self, value):
            self.values.append(value.flatten())

        def end(self):
            self.ended = True

    streamer, inputs = Streamer(), prompt([(1, 4, 6)])
    tokens = tiny.generate(**inputs, **GREEDY, streamer=streamer)
    assert streamer.ended and torch.equal(torch.cat(streamer.values), tokens[0])


def test_embeddings_instead_of_ids(tiny):
    inputs = prompt([])
    embeds = tiny.get_input_embeddings()(inputs["input_ids"])
    assert torch.equal(tiny(inputs_embeds=embeds).logits, tiny(**inputs).logits)
    assert torch.equal(tiny.generate(inputs_embeds=embeds, **GREEDY), new_tokens(tiny, inputs))


@pytest.mark.parametrize("beams", [1, 2])
def test_embeddings_with_ids_and_images(tiny, beams):
    inputs = prompt([(1, 4, 6)])
    embeds = tiny.get_input_embeddings()(inputs["input_ids"])
    expected = new_tokens(tiny, inputs, num_beams=beams)
    assert torch.equal(new_tokens(tiny, {**inputs, "inputs_embeds": embeds}, num_beams=beams), expected)
    del inputs["input_ids"]
    with pytest.raises(ValueError, match="images and videos need input_ids"):
        tiny.generate(**inputs, inputs_embeds=embeds, **GREEDY)


def test_second_turn_with_an_image_uses_the_cache(tiny):
    first, second = prompt([(1, 4, 6)]), prompt([(1, 4, 4)], seed=1)
    whole = {name: torch.cat([first[name], second[name]], dim=int(name == "input_ids")) for name in first}
    cache = tiny(**first).past_key_values
    output = tiny(**second, past_key_values=cache)
    expected = tiny(**whole)
    torch.testing.assert_close(output.logits, expected.logits[:, first["input_ids"].shape[1] :], atol=1e-4, rtol=1e-4)
    assert torch.equal(output.rope_deltas, expected.rope_deltas)


def test_generate_with_a_cache_and_a_new_image(tiny):
    first, second = prompt([(1, 4, 6)]), prompt([(1, 4, 4)], seed=1)
    whole = {name: torch.cat([first[name], second[name]], dim=int(name == "input_ids")) for name in first}
    cache = tiny(**first).past_key_values
    new = {**second, "input_ids": whole["input_ids"]}
    assert torch.equal(new_tokens(tiny, new, past_key_values=cache), new_tokens(tiny, whole))


def test_prompt_lookup_decoding_gives_the_same_tokens(tiny):
    inputs = prompt([(1, 4, 6)])
    # transformers 4 requires an end token here; this one is not in the vocabulary
    found = new_tokens(tiny, inputs, prompt_lookup_num_tokens=3, eos_token_id=1000)
    assert torch.equal(found, new_tokens(tiny, inputs))


def test_two_conversations_are_independent(tiny):
    prompts, _ = two_prompts()
    caches = [tiny(**single).past_key_values for single in prompts]
    token = torch.tensor([[5]])
    for single, cache in zip(prompts, caches, strict=True):
        longer = {**single, "input_ids": torch.cat([single["input_ids"], token], dim=1)}
        found = tiny(token, past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(found, tiny(**longer).logits[:, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "keye"])
def test_attention_implementations_give_the_same_logits(tiny, tiny_folder, implementation):
    _, batch = two_prompts()
    model = load(tiny_folder, attn_implementation=implementation)
    assert model.visual.config._attn_implementation == implementation
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(model(**batch).logits[mask], tiny(**batch).logits[mask], atol=1e-4, rtol=1e-4)
    assert torch.equal(new_tokens(model, batch, cache_implementation="static"), new_tokens(tiny, batch))


def test_default_attention_implementations(tiny_folder):
    def names(model):
        return model.config._attn_implementation, model.visual.config._attn_implementation

    config = AutoConfig.from_pretrained(tiny_folder)
    assert names(load(tiny_folder)) == ("sdpa", "keye")
    assert names(AutoModel.from_config(config)) == ("sdpa", "keye")
    for implementation in ("sdpa", "eager", "keye"):
        assert names(load(tiny_folder, attn_implementation=implementation)) == (implementation,) * 2
    assert names(load(tiny_folder, config=AutoConfig.from_pretrained(tiny_folder, attn_implementation="sdpa"))) == (
        "sdpa",
        "sdpa",
    )


def test_keye_attention_runs_the_packed_operator(tiny_folder, monkeypatch):
    model, calls = load(tiny_folder, attn_implementation="keye"), []
    real = kk.ops.varlen_attention
    monkeypatch.setattr(kk.ops, "varlen_attention", lambda *a, **k: calls.append(k.get("causal")) or real(*a, **k))
    model(**two_prompts()[1])
    assert calls == [None] * 2 + [True] * 2


def test_keye_attention_supports_a_mask_with_holes(tiny, tiny_folder):
    inputs = prompt([])
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, 2] = 0
    found = load(tiny_folder, attn_implementation="keye")(**inputs, attention_mask=mask).logits
    torch.testing.assert_close(found[:, 3:], tiny(**inputs, attention_mask=mask).logits[:, 3:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 12), (3, 1, 12), (4, 1, 12)], ids=str)
def test_given_position_ids(tiny, shape):
    """[B, S], [3, B, S], or [4, B, S] as in transformers, which puts text positions first."""
    ids = torch.arange(24).view(2, 12)
    positions = torch.arange(5, 17).expand(shape)
    shifted = tiny(ids, position_ids=positions).logits
    # Attention depends only on differences of positions
    torch.testing.assert_close(shifted, tiny(ids).logits, atol=1e-4, rtol=1e-4)
    cache = tiny(ids[:, :-1], position_ids=positions[..., :-1]).past_key_values
    last = tiny(ids[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(last, shifted[:, -1:], atol=1e-4, rtol=1e-4)
    scaled = tiny(ids, position_ids=2 * positions).logits
    assert (scaled - shifted).abs().max() > 1e-2


def test_eager_attention_returns_its_weights(tiny_folder):
    model, inputs = load(tiny_folder, attn_implementation="eager"), prompt([(1, 4, 6)])
    output = model(**inputs, output_attentions=True, output_hidden_states=True)
    assert len(output.attentions) == 2 and len(output.hidden_states) == 3
    weights = output.attentions[0]
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)


def test_missing_flash_attention_names_the_alternative(tiny_folder):
    if transformers.utils.is_flash_attn_2_available():
        pytest.skip("flash-attn is installed")
    with pytest.raises(ImportError, match=r'FlashAttention2.*; pass attn_implementation="keye", which needs no flash'):
        load(tiny_folder, attn_implementation="flash_attention_2")


def test_patch_embedding_matches_the_convolution():
    layer = PatchEmbedding(3, 8, kernel_size=14, stride=14)
    patches = torch.randn(5, 3, 14, 14)
    torch.testing.assert_close(layer(patches), torch.nn.Conv2d.forward(layer, patches), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickled_weights_are_rejected(tiny_folder, tmp_path, name):
    (tmp_path / "config.json").write_text((tiny_folder / "config.json").read_text())
    (tmp_path / name).touch()
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ValueError, match="pickled weights can run code"):
        load(tmp_path)


def test_remote_code_is_not_run(tiny, tiny_folder, tmp_path):
    """The files named in `auto_map` do not exist, so that running them would fail."""
    folder = save_checkpoint(
        tiny_model(),
        tmp_path / "model",
        {**CONFIG, "auto_map": {"AutoModel": "modeling_keye.KeyeForConditionalGeneration"}},
    )
    inputs = prompt([(1, 4, 6)])
    assert torch.equal(AutoModel.from_pretrained(folder)(**inputs).logits, tiny(**inputs).logits)


def test_integer_pixels_are_rejected(tiny):
    inputs = prompt([(1, 4, 6)])
    with pytest.raises(TypeError, match=r"pixel_values must be normalized.*uint8"):
        tiny(**{**inputs, "pixel_values": torch.zeros(24, 3, 14, 14, dtype=torch.uint8)})


def test_images_must_match_the_placeholders(tiny):
    inputs = prompt([(1, 4, 6)])
    with pytest.raises(ValueError, match="one image placeholder"):
        tiny(**{**inputs, "image_grid_thw": torch.tensor([[1, 4, 4]])})


def test_pixels_and_grids_must_be_given_together(tiny):
    inputs = prompt([(1, 4, 6)])
    for missing, other in (("image_grid_thw", "pixel_values"), ("pixel_values", "image_grid_thw")):
        with pytest.raises(ValueError, match=f"{other} needs {missing}"):
            tiny(**{name: value for name, value in inputs.items() if name != missing})


def test_image_features(tiny):
    inputs = prompt([(1, 4, 6)])
    features = tiny.get_image_features(pixel_values=inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"])
    assert features.shape == (6, tiny.config.hidden_size)


def test_scaled_rope_is_rejected():
    config = copy.deepcopy(CONFIG)
    config["rope_scaling"]["type"] = "yarn"
    with pytest.raises(ValueError, match="rope_scaling must have type"):
        AutoConfig.for_model(**config)


def test_nested_configuration_is_read(tmp_path):
    text = {name: value for name, value in CONFIG.items() if name not in ("model_type", "vision_config")}
    nested = {"model_type": "Keye", "vision_config": CONFIG["vision_config"], "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    assert AutoConfig.from_pretrained(tmp_path).lean() == kk.KeyeConfig.from_dict(CONFIG)


def test_rope_theta_of_the_tower_is_read_from_the_configuration(tiny, tmp_path):
    config = {**CONFIG, "vision_config": {**CONFIG["vision_config"], "rope_theta": 10.0}}
    folder = save_checkpoint(tiny_model(), tmp_path, config)
    inputs = prompt([(1, 4, 6)])
    found = load(folder)(**inputs).logits
    torch.testing.assert_close(found, kk.Keye.from_pretrained(folder)(**inputs).logits, atol=1e-4, rtol=1e-4)
    assert (found - tiny(**inputs).logits).abs().max() > 1e-3


@pytest.mark.parametrize("edition", EDITIONS.values(), ids=lambda edition: edition.name)
def test_classes_have_the_names_of_the_edition(edition):
    config = AutoConfig.for_model(edition.model_type)
    (model,) = (model for model in MODELS if model.config_class is type(config))
    assert model.__name__ == edition.architecture and config.lean().edition == edition.name
