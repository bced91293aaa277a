"""The small trained Keye model that is part of the package. It has the layout of the released models."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import Keye
    from .processing import KeyeProcessor

ASSETS = Path(__file__).parent / "assets"
SMALL = ASSETS / "small"


def small_model(**options: Any) -> "Keye":
    """Loads the small Keye model (Preview edition, about 2 million parameters).

    It was trained on images of one to three coloured shapes ("what is in the picture?") and on clips of one moving shape
    ("which way does it move?"). `examples/train_small` contains its data and training.

    Args:
        **options: keyword arguments of `Keye.from_pretrained`.
    """
    from .model import Keye

    return Keye.from_pretrained(SMALL, **options)


def small_processor(**options: Any) -> "KeyeProcessor":
    """Loads the processor of the small Keye model.

    Args:
        **options: keyword arguments of `KeyeProcessor.from_pretrained`.
    """
    from .processing import KeyeProcessor

    return KeyeProcessor.from_pretrained(SMALL, **options)
