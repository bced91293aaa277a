"""A vision tower of transformers before and after `kk.apply_keye_kernels`: PaddleOCR-VL, with random weights."""

from functools import lru_cache

import torch

from keye_kernels.integrations.patching.patch import apply_keye_kernels, revert_keye_kernels

from .measuring import RequiredWork, nbytes
from .peers import PATCHED, STOCK, Unavailable
from .shapes import Grid, num_patches
from .stages import BenchmarkCase, Call

PATCH_SIDE = 14
VISION = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 384}
TEXT = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 2}
SMALL_VISION = {"hidden_size": 144, "intermediate_size": 288, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


@lru_cache(maxsize=1)
def paddleocr_vl(small: bool, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """The model with SDPA. Its tower has the real size; of the decoder only the width matters here.

    Raises:
        Unavailable: transformers cannot be imported, or has no PaddleOCR-VL.
    """
    try:
        from transformers import PaddleOCRVLConfig, PaddleOCRVLForConditionalGeneration
    except ImportError as error:
        raise Unavailable(f"{STOCK}: the import failed ({error}); pip install transformers") from error
    vision = {"patch_size": PATCH_SIDE, **VISION, **(SMALL_VISION if small else {})}
    text = {"num_hidden_layers": 1, "vocab_size": 1024, **(SMALL_TEXT if small else TEXT)}
    torch.manual_seed(0)
    with torch.device(device):
        model = PaddleOCRVLForConditionalGeneration._from_config(
            PaddleOCRVLConfig(vision_config=vision, text_config=text), attn_implementation="sdpa"
        )
    return model.to(device, dtype).eval()


def patched_tower(grids: list[Grid], small: bool, dtype: torch.dtype, device: torch.device) -> BenchmarkCase:
    """Tower and projector of PaddleOCR-VL: pixels [T, 3, 14, 14] to features. Both implementations share one model.

    A call is valid until the other implementation is made.
    """
    tokens = num_patches(grids)
    pixels = torch.randn(tokens, 3, PATCH_SIDE, PATCH_SIDE, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    grid_thw = torch.tensor(grids, device=device)

    def features(model: torch.nn.Module) -> Call:
        def call() -> torch.Tensor:
            found = model.get_image_features(pixels, grid_thw)
            found = getattr(found, "pooler_output", found)
            return found if isinstance(found, torch.Tensor) else torch.cat(list(found))

        return call

    def stock() -> Call:
        model = paddleocr_vl(small, dtype, device)
        revert_keye_kernels(model)
        return features(model)

    def patched() -> Call:
        model = paddleocr_vl(small, dtype, device)
        apply_keye_kernels(model)
        return features(model)

    return BenchmarkCase(RequiredWork(tokens, nbytes(pixels)), {STOCK: stock, PATCHED: patched})
