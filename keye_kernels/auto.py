"""Importing this module registers Keye with transformers, so that existing scripts run without `trust_remote_code`.

    import keye_kernels.auto
    model = AutoModel.from_pretrained(path, dtype="auto", device_map="auto")
    processor = AutoProcessor.from_pretrained(path)

Raises:
    ImportError: transformers is missing or too old.
"""

from .integrations.transformers import register

register()
