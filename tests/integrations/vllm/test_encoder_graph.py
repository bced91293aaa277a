"""The protocol of vLLM's encoder CUDA graphs, with stubs in place of vLLM's classes. Runs without vLLM.

Instead of a replay, the forward is called again on the buffers of the capture. `test_encoder_manager.py` does it with vLLM.
"""

from types import SimpleNamespace

import pytest
import torch

from .encoder_replay import BATCHES, BUDGET, EDITIONS, build, capture, copy_to_buffers, inputs
from .stubs import SupportsEncoderCudaGraph, class_of


def replay(model, buffers, mm_kwargs):
    copy_to_buffers(model, buffers, mm_kwargs)
    with torch.no_grad():
        return model.encoder_cudagraph_forward(dict(buffers))


@pytest.mark.parametrize("options", [{}, {"quant_config": "fp8"}], ids=["plain", "quantized"])
@pytest.mark.parametrize("model_type", EDITIONS)
def test_a_graph_gives_the_embeddings_of_every_batch_that_fits(models, model_type, options):
    model = build(models, model_type, **options)
    buffers, first = capture(model), []
    for grids in [*BATCHES, *BATCHES]:
        mm_kwargs = inputs(grids)
        found = replay(model, buffers, mm_kwargs)
        with torch.no_grad():
            expected = model.encoder_eager_forward(mm_kwargs)
            per_image = model.mlp_AR(model.visual.vision_model(mm_kwargs["pixel_values"], grids), torch.tensor(grids))
        assert torch.equal(expected, torch.cat(per_image))
        assert found.shape == (BUDGET, model.get_encoder_cudagraph_config().out_hidden_size)
        torch.testing.assert_close(found[: len(expected)], expected, atol=1e-5, rtol=1e-5)
        first.append(found)
    for found, again in zip(first[:3], first[3:], strict=True):
        assert torch.equal(found, again)  # whatever was in the buffers


@pytest.mark.parametrize("model_type", EDITIONS)
def test_new_buffers_give_the_same_bits(models, model_type):
    """A graph with other buffers of the same size, and the eager forward at the same padding."""
    model = build(models, model_type)
    used = capture(model)
    replay(model, used, inputs(BATCHES[2], seed=7))
    assert torch.equal(replay(model, used, inputs(BATCHES[0])), replay(model, capture(model), inputs(BATCHES[0])))


def test_patches_behind_the_images_have_finite_embeddings(models):
    """Layers with one scale for all rows (fp8) would otherwise spread a NaN."""
    model = build(models, "Keye")
    assert replay(model, capture(model), inputs([(1, 2, 2)])).isfinite().all()


def test_the_forward_gives_the_kernel_offsets_only(models, monkeypatch):
    """A tile schedule, or the lengths on the CPU, would be those of the capture."""
    model, seen = build(models, "KeyeVL1_5"), []
    attend = models.vision.ops.varlen_attention
    monkeypatch.setattr(models.vision.ops, "varlen_attention", lambda *args, **kw: seen.append(args[3]) or attend(*args, **kw))
    buffers = capture(model)
    replay(model, buffers, inputs(BATCHES[0]))
    assert len(seen) == 2 and all(s.lengths is None and not s.covers_all_tokens for s in seen)
    assert all(s.cu_seqlens is buffers["cu_seqlens"] and s.max_seqlen == 4 * BUDGET for s in seen)
    assert buffers["cu_seqlens"].tolist() == [0, 24, 28, 28, 28]


def test_the_modules_that_vllm_calls_are_called(models):
    """vLLM replaces their forwards where weights are offloaded."""
    model, called = build(models, "Keye"), []
    for module in (model.visual, model.mlp_AR):
        module.register_forward_hook(lambda module, *_: called.append(module))
    replay(model, capture(model), inputs(BATCHES[0]))
    model.encoder_eager_forward(inputs(BATCHES[0]))
    assert called == [model.visual, model.mlp_AR] * 2


def test_videos_have_one_segment_in_preview_and_run_eagerly_in_1_5(models):
    preview, v1_5 = build(models, "Keye"), build(models, "KeyeVL1_5")
    assert preview.get_encoder_cudagraph_config().modalities == ["image", "video"]
    assert v1_5.get_encoder_cudagraph_config().modalities == ["image"]
    video, buffers = inputs([(3, 4, 4), (2, 2, 2)], "video"), capture(preview)
    assert preview.get_input_modality(video) == "video"
    found = replay(preview, buffers, video)
    assert buffers["cu_seqlens"].tolist() == [0, 48, 56, 56, 56]
    with torch.no_grad():
        torch.testing.assert_close(found[:14], preview.encoder_eager_forward(video), atol=1e-5, rtol=1e-5)


def test_items_are_selected_in_the_given_order(models):
    model, mm_kwargs = build(models, "Keye"), inputs(BATCHES[2])
    specs = model.get_encoder_cudagraph_item_specs(mm_kwargs)
    assert [(spec.input_size, spec.output_tokens) for spec in specs] == [(8, 2), (8, 2), (4, 1), (36, 9)]
    found = model.select_encoder_cudagraph_items(mm_kwargs, [3, 0])
    assert found["image_grid_thw"].tolist() == [[1, 6, 6], [1, 2, 4]]
    assert torch.equal(found["pixel_values"], torch.cat((mm_kwargs["pixel_values"][20:], mm_kwargs["pixel_values"][:8])))
    nothing = model.select_encoder_cudagraph_items(mm_kwargs, [])
    assert nothing["pixel_values"].shape == (0, 3, 14, 14) and nothing["image_grid_thw"].shape == (0, 3)
    video = model.select_encoder_cudagraph_items(inputs([(2, 2, 2)], "video"), [0])
    assert sorted(video) == ["pixel_values_videos", "video_grid_thw"]


@pytest.mark.parametrize(("tokens", "length", "expected"), [(8192, 4096, (64, 1024)), (512, 4096, (64, 512)), (64, 48, (48, 48))])
def test_budgets_are_limited_by_the_size_of_a_batch(models, tokens, length, expected):
    scheduler, model_config = SimpleNamespace(max_num_batched_tokens=tokens), SimpleNamespace(max_model_len=length)
    config = SimpleNamespace(scheduler_config=scheduler, model_config=model_config)
    assert build(models, "Keye").get_encoder_cudagraph_budget_range(config) == expected


def test_lora_of_the_tower_needs_eager_encoding(models):
    model = build(models, "Keye", lora_config=SimpleNamespace(enable_tower_connector_lora=True))
    with pytest.raises(ValueError, match="cudagraph_mm_encoder must be False with enable_tower_connector_lora"):
        model.get_encoder_cudagraph_config()
    build(models, "Keye", lora_config=SimpleNamespace(enable_tower_connector_lora=False)).get_encoder_cudagraph_config()


@pytest.mark.parametrize("model_type", EDITIONS)
def test_classes_have_vllms_protocol_behind_their_own_methods(models, model_type):
    """The initializer of a protocol that comes first would not call that of the model."""
    assert class_of(models, model_type).__mro__[-2] is SupportsEncoderCudaGraph
