"""Registration of Keye with transformers' Auto classes. Both functions may be called several times."""

from .versions import require_transformers


def register_processors() -> None:
    """Registers configuration, image processor, tokenizer and processor of both editions, and imports no model code.

    For servers that have their own model classes, such as vLLM. Raises ImportError if transformers is missing or too old.
    """
    require_transformers()
    from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

    from .config import CONFIGS
    from .image_processing import IMAGE_PROCESSORS
    from .processing import PROCESSORS

    for model_type, config in CONFIGS.items():
        AutoConfig.register(model_type, config, exist_ok=True)
        AutoImageProcessor.register(config, slow_image_processor_class=IMAGE_PROCESSORS[model_type], exist_ok=True)
        AutoTokenizer.register(config, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
        AutoProcessor.register(config, PROCESSORS[model_type], exist_ok=True)


def register() -> None:
    """Registers the models of both editions and what `register_processors` does. Raises ImportError as it does."""
    register_processors()
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    from .modeling import MODELS

    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
        for model in MODELS:
            auto_class.register(model.config_class, model, exist_ok=True)
