"""What vLLM does around a CUDA graph of the vision encoder, without vLLM: see its `v1/worker/encoder_cudagraph.py`."""

import torch

from tests.helpers.tiny import prompt, tiny_model

from .stubs import class_of, vllm_config

EDITIONS = ["Keye", "KeyeVL1_5"]
CPU = torch.device("cpu")
BUDGET, MAX_IMAGES = 32, 4
BATCHES = [[(1, 4, 6), (1, 2, 2)], [(1, 8, 4)], [(1, 2, 4), (1, 4, 2), (1, 2, 2), (1, 6, 6)]]


def build(models, model_type, device=CPU, **options):
    lean = tiny_model(model_type=model_type).to(device)
    model = class_of(models, model_type)(vllm_config=vllm_config(models, lean, **options))
    model.mlp_AR.to(device)
    return model


def inputs(grids, modality="image", seed=0, device=CPU):
    pixels = torch.cat([prompt([grid], seed=seed + index)["pixel_values"] for index, grid in enumerate(grids)])
    names = ("pixel_values", "image_grid_thw") if modality == "image" else ("pixel_values_videos", "video_grid_thw")
    return dict(zip(names, (pixels.to(device), torch.tensor(grids)), strict=True))


def capture(model, device=CPU):
    """The buffers that a graph is captured with."""
    return model.prepare_encoder_cudagraph_capture_inputs(BUDGET, MAX_IMAGES, 0, device, torch.float32).values


def copy_to_buffers(model, buffers, mm_kwargs):
    """Before a replay."""
    config = model.get_encoder_cudagraph_config()
    values = model.prepare_encoder_cudagraph_replay_buffers(mm_kwargs, MAX_IMAGES, 0).values
    assert sorted(values) == sorted(buffers) == sorted(config.buffer_keys)
    for name, buffer in buffers.items():
        if name in config.padding_logics:
            config.padding_logics[name](buffer, values[name])
        else:
            buffer.zero_()
            buffer[: len(values[name])].copy_(values[name])
