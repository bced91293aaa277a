"""The two editions of Keye-VL and what differs between them. Imports nothing else of the package.

The differences are described in docs/models/keye_vl_1_5.md, "Summary of differences from Preview".
"""

from dataclasses import dataclass
from typing import Literal

EditionName = Literal["preview", "1.5"]

# The language model gets one token per block of 28 x 28 pixels.
TOKEN_SIDE_PIXELS = 28
PIXELS_PER_TOKEN = TOKEN_SIDE_PIXELS**2


@dataclass(frozen=True)
class Edition:
    """What depends on the edition of a checkpoint."""

    name: EditionName
    # `model_type` and the model class in `config.json`
    model_type: str
    architecture: str
    # Vision attention runs within single frames; otherwise within whole images and videos.
    segment_by_frame: bool
    # The projector normalizes single patches, before the 2x2 merge; otherwise the merged vectors.
    norm_before_merge: bool
    # For 3D positions each frame is a block of its own, and placeholders are assigned to grids by count; otherwise a video is one
    # block with a time axis, which starts after `<|vision_start|>`.
    position_block_per_frame: bool
    # `max_position_embeddings` of the released model
    context_length: int
    # Smallest and largest area of an image in pixels, before the limits of the image processor
    image_pixel_limits: tuple[int, int]
    # Default resize filter of the image processor, as Pillow's number: 2 is bilinear, 3 is bicubic.
    resample: int
    # Transparent images are blended onto white; otherwise the alpha channel is dropped.
    blend_alpha: bool
    # The frames of a video are slow (large) or fast (small), each after a marker and its time.
    slow_fast_frames: bool
    # What `process_vision_info` returns about the videos and the processor takes as keyword arguments
    video_kwargs: tuple[str, ...]


PREVIEW = Edition(
    name="preview",
    model_type="Keye",
    architecture="KeyeForConditionalGeneration",
    segment_by_frame=False,
    norm_before_merge=True,
    position_block_per_frame=False,
    context_length=40960,
    image_pixel_limits=(4 * PIXELS_PER_TOKEN, 16384 * PIXELS_PER_TOKEN),
    resample=3,
    blend_alpha=True,
    slow_fast_frames=False,
    video_kwargs=("fps",),
)
V1_5 = Edition(
    name="1.5",
    model_type="KeyeVL1_5",
    architecture="KeyeVL1_5ForConditionalGeneration",
    segment_by_frame=True,
    norm_before_merge=False,
    position_block_per_frame=True,
    context_length=131072,
    image_pixel_limits=(4 * PIXELS_PER_TOKEN, 20480 * PIXELS_PER_TOKEN),
    resample=2,
    blend_alpha=False,
    slow_fast_frames=True,
    video_kwargs=("height", "width", "fast_height", "fast_width", "timestamps", "frame_types"),
)
EDITIONS: dict[EditionName, Edition] = {edition.name: edition for edition in (PREVIEW, V1_5)}


def edition_of(model_type: str | None) -> Edition:
    """Returns the edition with this `model_type` in `config.json`; raises ValueError if there is none."""
    for edition in EDITIONS.values():
        if edition.model_type == model_type:
            return edition
    known = ", ".join(edition.model_type for edition in EDITIONS.values())
    raise ValueError(f"model_type must be one of {known}, got {model_type!r}")


def edition_named(name: str) -> Edition:
    """Returns the edition "preview" or "1.5"; raises ValueError for another name."""
    if name not in EDITIONS:
        raise ValueError(f"edition must be one of {list(EDITIONS)}, got {name!r}")
    return EDITIONS[name]
