"""Tiny random models of each family, their inputs (two sequences, with images of different sizes and a clip), and helpers."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import nn

IMAGE, VIDEO, VISION_START = 115, 116, 112
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 120,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}
# head dim 72, as in Keye
VISION = {"hidden_size": 144, "intermediate_size": 96, "patch_size": 4}
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": VISION_START}
IMAGE_GRIDS = ((1, 4, 6), (1, 8, 4))
VIDEO_GRID = (2, 4, 4)


def _paddleocr_vl(text: Mapping = MappingProxyType({}), vision: Mapping = MappingProxyType({})) -> nn.Module:
    from transformers import PaddleOCRVLConfig, PaddleOCRVLForConditionalGeneration

    vision = {**VISION, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, **vision}
    config = PaddleOCRVLConfig(text_config={**TEXT, "head_dim": 16, **text}, vision_config=vision, **TOKENS)
    return PaddleOCRVLForConditionalGeneration(config)


def _qwen2_vl() -> nn.Module:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {"embed_dim": 144, "hidden_size": 64, "depth": 2, "num_heads": 2, "mlp_ratio": 1, "patch_size": 4}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=TEXT, vision_config=vision, **TOKENS))


def _qwen2_5_vl() -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {**VISION, "depth": 2, "num_heads": 2, "out_hidden_size": 64, "window_size": 16}
    vision["fullatt_block_indexes"] = [1]
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=TEXT, vision_config=vision, **TOKENS))


def _qwen3_vl() -> nn.Module:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = {**VISION, "depth": 2, "num_heads": 2, "out_hidden_size": 64, "num_position_embeddings": 16}
    vision["deepstack_visual_indexes"] = [0]
    config = Qwen3VLConfig(text_config={**TEXT, "head_dim": 16}, vision_config=vision, **TOKENS)
    return Qwen3VLForConditionalGeneration(config)


def _keye() -> nn.Module:
    from tests.helpers.keye_official import KeyeForConditionalGeneration, official_config

    return KeyeForConditionalGeneration(official_config())


BUILDERS = {
    "keye": _keye,
    "paddleocr_vl": _paddleocr_vl,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
}
WITH_VIDEO = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def build(family: str, **changes: Mapping) -> nn.Module:
    """A seeded float32 model with weights large enough that every part affects the logits. `changes` go to its builder."""
    torch.manual_seed(0)
    model = BUILDERS[family](**changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(mean=float("norm" in name and "weight" in name), std=0.1)
    return model.eval()


def batch(family: str) -> dict[str, torch.Tensor]:
    """Two sequences, left-padded, with an image each; the second also has a clip if the family supports video."""
    generator = torch.Generator().manual_seed(1)

    def text(length: int) -> list[int]:
        return torch.randint(3, 100, (length,), generator=generator).tolist()

    sequences = []
    for grid in IMAGE_GRIDS:
        sequences.append([*text(3), VISION_START, *[IMAGE] * (grid[1] * grid[2] // 4), 113, *text(4)])
    if family in WITH_VIDEO:
        frames, height, width = VIDEO_GRID
        pads = [VIDEO] * (height * width // 4)
        # Qwen3-VL puts a timestamp before each frame
        clip = [token for _ in range(frames) for token in (*([7] if family == "qwen3_vl" else []), *pads)]
        sequences[1] += [VISION_START, *clip, 113, *text(2)]
    length = max(map(len, sequences))
    input_ids = torch.tensor([[0] * (length - len(sequence)) + sequence for sequence in sequences])
    inputs = {"input_ids": input_ids, "attention_mask": (input_ids != 0).long()}
    inputs["image_grid_thw"] = torch.tensor(IMAGE_GRIDS)
    inputs["pixel_values"] = _pixels(family, IMAGE_GRIDS, generator)
    if family in WITH_VIDEO:
        inputs["video_grid_thw"] = torch.tensor([VIDEO_GRID])
        inputs["pixel_values_videos"] = _pixels(family, (VIDEO_GRID,), generator)
    if family == "keye":
        inputs["position_ids"] = torch.randint(0, 40, (3, *input_ids.shape), generator=generator)
    else:
        inputs["mm_token_type_ids"] = (input_ids == IMAGE).int() + 2 * (input_ids == VIDEO).int()
    return inputs


def image(family: str, grid: tuple[int, int, int]) -> torch.Tensor:
    """The patches of one image."""
    return _pixels(family, (grid,), torch.Generator().manual_seed(1))


def _pixels(family: str, grids: tuple, generator: torch.Generator) -> torch.Tensor:
    patches = sum(t * h * w for t, h, w in grids)
    shape = (patches, 3, 4, 4) if family in ("keye", "paddleocr_vl") else (patches, 3 * 2 * 4 * 4)
    return torch.randn(shape, generator=generator)


def logits(model: nn.Module, family: str, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(family), **options).logits


def instance_forwards(model: nn.Module) -> dict[str, object]:
    """Module name -> forward, for modules with a forward of their own in `__dict__`. Patched modules have one."""
    return {name: module.__dict__["forward"] for name, module in model.named_modules() if "forward" in module.__dict__}


def operators_run(model: nn.Module, family: str) -> set[str]:
    """Names of this package's operators that run in one forward."""
    with torch.profiler.profile() as profile:
        logits(model, family)
    return {event.name.removeprefix("keye_kernels::") for event in profile.events() if "keye_kernels" in event.name}
