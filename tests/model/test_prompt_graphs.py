"""Short prompts with CUDA graphs: the same logits, cache and tokens. The CPU plays the GPU, as in test_image_graphs."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import keye_kernels as kk
from keye_kernels.model import graphs, prompt_graphs
from keye_kernels.model.prompt_graphs import Bucket
from tests.helpers.fake_graphs import FakeGpu
from tests.helpers.tiny import prompt, tiny_model

ROUNDING = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(graphs, "DEVICE_TYPES", ("cpu",))
    monkeypatch.setattr(graphs, "runs_triton", lambda module, device: True)
    monkeypatch.setattr(prompt_graphs, "TOKEN_BUCKETS", (16, 32, 64))
    return FakeGpu(monkeypatch)


def ids(*lengths, seed=0):
    """Prompts of these lengths, padded on the left, and their mask."""
    longest = max(lengths)
    mask = torch.stack([torch.arange(longest) >= longest - length for length in lengths]).long()
    tokens = torch.randint(0, 100, mask.shape, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens * mask, "attention_mask": mask}


@torch.no_grad()
def prefill(model, cuda_graphs=True, **inputs):
    model.cuda_graphs = cuda_graphs
    return model(**inputs)


def assert_same(found, expected, mask):
    torch.testing.assert_close(found.logits[mask.bool()], expected.logits[mask.bool()], **ROUNDING)
    length = mask.shape[1]
    for name in ("keys", "values"):
        for x, y in zip(getattr(found.cache, name), getattr(expected.cache, name), strict=True):
            torch.testing.assert_close(x[:, :length][mask.bool()], y[:, :length][mask.bool()], **ROUNDING)
            assert not x[:, length:].any(), "slots after the prompt are not written"
    for name in ("valid", "length", "rope_deltas"):
        assert torch.equal(getattr(found.cache, name), getattr(expected.cache, name))
    assert found.cache.is_empty is False


def test_prompts_of_one_bucket_share_a_graph(gpu):
    model = tiny_model()
    for seed, length in enumerate([16, 9, 12, 1, 16, 10]):
        inputs = ids(length, seed=seed)
        assert_same(prefill(model, **inputs), prefill(model, False, **inputs), inputs["attention_mask"])
    assert [graph.replays for graph in gpu.captured] == [5]


def test_batches_with_padding(gpu):
    model = tiny_model()
    for seed, lengths in enumerate([(3, 16), (7, 2), (10, 10), (5, 5)]):
        inputs = ids(*lengths, seed=seed)
        assert_same(prefill(model, **inputs), prefill(model, False, **inputs), inputs["attention_mask"])
        inputs = {name: x.flip(1) for name, x in inputs.items()}  # padding on the right
        assert_same(prefill(model, **inputs), prefill(model, False, **inputs), inputs["attention_mask"])
    assert [graph.replays for graph in gpu.captured] == [7]


@pytest.mark.parametrize("edition", ["Keye", "KeyeVL1_5"])
def test_tokens_after_a_prompt_with_an_image(gpu, edition):
    model = tiny_model(model_type=edition)
    options = {"max_new_tokens": 12, "eos_token_id": ()}
    for seed in range(3):
        inputs = prompt([(1, 4, 6)], seed=seed)
        model.cuda_graphs = True
        found = model.generate(**inputs, **options)
        model.cuda_graphs = False
        assert torch.equal(found, model.generate(**inputs, **options))
    assert [graph.replays for graph in gpu.captured] == [2, 2]  # the image, the prompt


def test_a_later_turn_runs_without_a_graph(gpu):
    model = tiny_model()
    inputs = ids(9)
    outputs = []
    for cuda_graphs in (True, True, True, False):
        first = prefill(model, cuda_graphs, **inputs, cache=model.new_cache(1, 40))
        outputs.append(prefill(model, cuda_graphs, **ids(5, seed=3), cache=first.cache).logits)
    assert gpu.captured[0].replays == 2
    torch.testing.assert_close(outputs[2], outputs[3], **ROUNDING)


def test_buckets():
    assert Bucket.of(1, 1)[:2] == (1, 32) and Bucket.of(1, 33)[:2] == (1, 64) and Bucket.of(1, 512)[:2] == (1, 512)
    assert Bucket.of(1, 513) is None and Bucket.of(0, 4)[:2] == (0, 32)
    assert Bucket.of(4, 128)[:2] == (4, 128) and Bucket.of(4, 129) is None and Bucket.of(16, 32) and Bucket.of(17, 2) is None
    with kk.use_impl("torch"):
        assert Bucket.of(1, 1).default_impl == "torch"


def test_long_prompts_and_gradients_run_without_a_graph(gpu):
    model = tiny_model()
    for _ in range(3):
        prefill(model, **ids(65))
        prefill(model, **ids(33, 33))
        assert model(**ids(9)).logits.requires_grad
    assert gpu.captured == []


def change_weight(model):
    model.model.layers[1].mlp.down_proj.weight = nn.Parameter(torch.randn_like(model.model.layers[1].mlp.down_proj.weight))


def change_theta(model):
    model.model.config = replace(model.config, rope_theta=100.0)


def change_sections(model):
    model.model.layers[0].self_attn.mrope_section[:] = [16, 0, 0]


def change_norm(model):
    model.model.layers[1].self_attn.q_norm.eps = 10.0


@pytest.mark.parametrize("change", [change_weight, change_theta, change_sections, change_norm])
@pytest.mark.parametrize("prompts_before", [1, 2, 3])
def test_a_changed_decoder_drops_its_graphs(gpu, change, prompts_before):
    model, inputs = tiny_model(), prompt([(1, 4, 6)])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for _ in range(prompts_before):
        before = prefill(model, **inputs)
    change(model)
    for _ in range(3):
        found = prefill(model, **inputs)
        assert_same(found, prefill(model, False, **inputs), inputs["attention_mask"])
    assert not torch.allclose(found.logits, before.logits)
    assert [entry.graph.replays for entry in model.model.graphs._entries.values()] == [2 if prompts_before == 1 else 1]


@pytest.mark.parametrize("when", [1, 2, 3])
def test_hooks_run_once_per_prompt_and_the_cache_is_written_once(gpu, when):
    model, inputs, calls = tiny_model(), ids(12), []
    for _ in range(when):
        prefill(model, **inputs)
    model.model.layers[0].mlp.register_forward_hook(lambda module, arguments, output: calls.append(module) or output * 2)
    if when > 1:
        gpu.captured[0].run = lambda: gpu.captured[0].result
    for number in (1, 2, 3):
        found = prefill(model, **inputs)
        assert len(calls) == number
    assert_same(found, prefill(model, False, **inputs), inputs["attention_mask"])
    assert int(found.cache.length) == 12


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("other", [torch.no_grad, torch.inference_mode])
def test_caches_of_both_modes_are_filled(gpu, mode, other):
    model, inputs = tiny_model(), ids(12)
    for context in (mode, mode, other, mode):
        with context():
            output = model(**inputs)
            model(output.logits[:, -1:].argmax(-1), cache=output.cache)
            assert output.logits.is_inference() == (context is torch.inference_mode)
    assert gpu.captured[0].replays == 3


def test_all_buckets_share_the_memory_of_keys_and_values(gpu):
    model = tiny_model()
    for lengths in ((3,), (30,), (8, 8)):
        for _ in range(2):
            prefill(model, **ids(*lengths))
    storage = 2 * 2 * 64 * 2 * 32 * 4  # keys and values, layers, tokens, heads, head dim, bytes
    inputs = (16 + 32 + 32) * (64 * 4 + 3 * 8)
    assert model.model.graphs.memory() == (3, 3000 + inputs + storage)
    pointers = {entry.cache.keys[0].data_ptr() for entry in model.model.graphs._entries.values()}
    assert len(pointers) == 1
    model.model.to(torch.float64)
    assert model.model.graphs.memory() == (0, 0) and model.model.graphs._storage is None
    expected = prefill(model.double(), False, **ids(3))
    for _ in range(3):
        torch.testing.assert_close(prefill(model, **ids(3)).logits, expected.logits, **ROUNDING)


def test_hidden_states_are_not_overwritten_by_the_next_prompt(gpu):
    """Another thread may run it before the head has read them."""
    model = tiny_model()

    def hidden(seed):
        embeds = torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(seed))
        positions = torch.arange(12).expand(3, 1, 12)
        return model.model.graphs.prefill(model.model, embeds, positions, torch.ones(1, 12), model.new_cache(1, 20))

    with torch.no_grad():
        hidden(0)
        found = hidden(1)
        before = found.clone()
        hidden(2)
    assert gpu.captured[0].replays == 2 and torch.equal(found, before)
