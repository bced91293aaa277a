"""The base class of Keye's transformers models: loading, and what the models support."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from keye_kernels.model.checkpoint import UNUSED

from .config import KeyeConfig

PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth")


class KeyePreTrainedModel(PreTrainedModel):
    config_class = KeyeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # The tower is kept on one device, because its layers share the geometry of the batch
    _no_split_modules = ["KeyeVisionTransformer", "TextLayer"]  # noqa: RUF012 - transformers reads class attributes
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [name.replace(".", r"\.") for name in UNUSED]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Loads a model as in transformers, but raises ValueError for pickled weights."""
        folder = Path(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "")
        pickled = any(any(folder.glob(name)) for name in PICKLES) and not any(folder.glob("model*.safetensors"))
        if pickled or kwargs.pop("use_safetensors", None) is False:
            raise ValueError(
                f"{pretrained_model_name_or_path}: pickled weights can run code and are refused; convert them to safetensors"
            )
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, use_safetensors=True, **kwargs)
        except ImportError as error:
            if "flash" not in str(error).lower():
                raise
            message = str(error).rstrip(". \n")
            raise ImportError(f'{message}; pass attn_implementation="keye", which needs no flash-attn') from error
