"""Keye in transformers. `register()` serves the Auto classes; `register_processors()` does so without the model's classes.

Both are cheap and may be called any number of times. Config and processors alone are what a server needs that brings
models of its own, such as vLLM: `register_processors()` imports neither `modeling` nor transformers' model code.
"""

from .versions import require_transformers

EDITIONS = ("Keye", "KeyeVL1_5")


def register_processors() -> None:
    """Config, image processor, tokenizer and processor of both editions for transformers' Auto classes.

    Raises: ImportError where transformers is missing or too old.
    """
    require_transformers()
    from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

    from .config import CONFIGS
    from .image_processing import IMAGE_PROCESSORS
    from .processing import PROCESSORS

    for model_type in EDITIONS:
        config = CONFIGS[model_type]
        AutoConfig.register(model_type, config, exist_ok=True)
        AutoImageProcessor.register(config, slow_image_processor_class=IMAGE_PROCESSORS[model_type], exist_ok=True)
        AutoTokenizer.register(config, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
        AutoProcessor.register(config, PROCESSORS[model_type], exist_ok=True)


def register() -> None:
    """As `register_processors`, and the models for AutoModel, AutoModelForCausalLM and AutoModelForImageTextToText."""
    register_processors()
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    from .config import CONFIGS
    from .modeling import MODELS

    for model_type in EDITIONS:
        for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
            auto_class.register(CONFIGS[model_type], MODELS[model_type], exist_ok=True)
