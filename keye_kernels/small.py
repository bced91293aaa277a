"""The small trained Keye that comes with the package: a world of coloured shapes, in the layout of the released models."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import Keye
    from .processing import KeyeProcessor

SMALL = Path(__file__).parent / "assets" / "small"


def small_model(**options: Any) -> "Keye":
    """The small Keye (Preview edition, about 2 million parameters), loaded as `Keye.from_pretrained(folder, **options)` does.

    It answers questions such as "what is in the picture?" about pictures of one to three coloured shapes, and "which way does
    it move?" about clips of one; `examples/train_small` describes its world and trains it.
    """
    from .model import Keye

    return Keye.from_pretrained(SMALL, **options)


def small_processor(**options: Any) -> "KeyeProcessor":
    """The processor of `small_model`, loaded as `KeyeProcessor.from_pretrained(folder, **options)` does."""
    from .processing import KeyeProcessor

    return KeyeProcessor.from_pretrained(SMALL, **options)
