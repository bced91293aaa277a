"""A tiny model with random weights, its checkpoint and prompts, for tests that need no official numbers."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

import keye_kernels as kk
from keye_kernels.model.checkpoint import destinations

CONFIG = {
    "model_type": "Keye",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 120,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
    "max_position_embeddings": 2048,
    "vision_start_token_id": 112,
    "image_token_id": 115,
    "video_token_id": 116,
    "vision_config": {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
    },
}


def tiny_model(**changes) -> kk.Keye:
    """A float32 model with seeded weights, large enough that every part changes the logits."""
    from keye_kernels.model import Keye

    torch.manual_seed(0)
    model = Keye(kk.KeyeConfig.from_dict({**CONFIG, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.normal_(mean=float("norm" in name and "weight" in name), std=0.1)
    return model.eval()


def save_checkpoint(model: kk.Keye, folder: Path, config: dict = CONFIG, **tensors: torch.Tensor) -> Path:
    """Writes config.json and model.safetensors. `tensors` adds or replaces tensors of the model; None removes one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: view.clone().contiguous() for name, view in destinations(model).items()} | tensors
    save_file({name: value for name, value in weights.items() if value is not None}, folder / "model.safetensors")
    return folder


def prompt(grid_thw: list[tuple[int, int, int]], lead: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """One sequence: `lead` text tokens, each image between its start and end tokens, then 4 text tokens."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 100, (lead + 4,), generator=generator).tolist()
    ids = text[:lead]
    for t, h, w in grid_thw:
        ids += [112] + [115] * (t * h * w // 4) + [113]
    ids += text[lead:]
    grid = torch.tensor(grid_thw).view(-1, 3)
    inputs = {"input_ids": torch.tensor([ids])}
    if grid_thw:
        pixels = torch.randn(int(grid.prod(1).sum()), 3, 14, 14, generator=generator)
        inputs |= {"pixel_values": pixels, "image_grid_thw": grid}
    return inputs
