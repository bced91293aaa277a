"""Reports how a video is sampled: times, slow and fast frames, and tokens per frame, as a table and as a plot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from keye_kernels.editions import EditionName, edition_named

from .packing import video_prompt
from .patches import PatchConfig, to_frame_tensors
from .processor import KeyeProcessor
from .sampling import sample_indices
from .slow_fast import FAST, SLOW
from .tokenizer import FAST_END, FAST_START, FRAME, VIDEO_PAD
from .videos import fetch_video

THUMBNAIL_HEIGHT_PIXELS = 90
MAX_THUMBNAILS = 12


@dataclass(frozen=True)
class VideoInspection:
    """The N sampled frames of a video and their tokens."""

    edition: EditionName
    seconds: list[float]  # [N]; the frame indices for a list of images without fps
    frame_types: list[int]  # [N], 0 for slow and 1 for fast; all frames of Preview are slow
    frame_sizes: list[tuple[int, int]]  # N pairs (height, width) in pixels
    frame_tokens: list[int]  # [N], vision tokens
    text_tokens: int  # tokens of the markers and times between the frames of 1.5
    thumbnails: dict[int, torch.Tensor]  # by frame index, at most 12 frames, uint8 [3, 90, w]

    @property
    def total_tokens(self) -> int:
        """Number of tokens of the video, vision and text."""
        return sum(self.frame_tokens) + self.text_tokens

    def to_text(self, context_length: int | None = None) -> str:
        """Formats a table of the frames and their total, also as a percentage of `context_length` if given."""
        lines = ["frame  seconds  type  height x width  tokens"]
        rows = zip(self.seconds, self.frame_types, self.frame_sizes, self.frame_tokens, strict=True)
        for index, (seconds, frame_type, (height, width), tokens) in enumerate(rows):
            name = "fast" if frame_type == FAST else "slow"
            lines.append(f"{index:5d}  {seconds:7.2f}  {name}  {height:6d} x {width:<5d}  {tokens:6d}")
        slow = self.frame_types.count(SLOW)
        total = f"{self.total_tokens} tokens"
        if context_length:
            total += f", {self.total_tokens / context_length:.1%} of the context of {context_length}"
        lines.append(f"{len(self.seconds)} frames ({slow} slow, {len(self.seconds) - slow} fast): {total}")
        return "\n".join(lines)


def inspect_video(
    video: Any, processor: KeyeProcessor | EditionName = "preview", options: Mapping[str, Any] | None = None
) -> VideoInspection:
    """Samples a video as the processor does and counts its tokens. Raises the errors of `process_vision_info`.

    `video` and `options` (such as `fps`) are entries of a message part. `processor` may also be "preview" or "1.5", for the
    default limits of an edition.
    """
    if isinstance(processor, KeyeProcessor):
        edition, config = processor.edition, processor.patch_config
    else:
        edition, config = processor, PatchConfig.from_dict({}, processor)
    sampled = fetch_video({**(options or {}), "video": video}, edition=edition)
    frames = to_frame_tensors(sampled.frames, edition)
    if edition_named(edition).slow_fast_frames:
        types = sampled.frame_types.tolist()
        sizes = [(sampled.slow_size, sampled.fast_size)[frame_type] for frame_type in types]
        text_tokens = _count_text_tokens(types, sampled.seconds)
    else:
        types = [SLOW] * len(frames)
        sizes = [config.resized_size(*frames[0].shape[1:])] * len(frames)
        text_tokens = 0
    seconds = [float(index) for index in range(len(frames))]
    if sampled.seconds is not None:
        # Preview repeats the last frame of a list of odd length.
        seconds = (sampled.seconds.tolist() + sampled.seconds[-1:].tolist())[: len(frames)]
    tokens = [height * width // config.factor**2 for height, width in sizes]
    shown = sample_indices(0, len(frames) - 1, min(len(frames), MAX_THUMBNAILS))
    thumbnails = {index: _thumbnail(frames[index]) for index in shown}
    return VideoInspection(edition, seconds, types, sizes, tokens, text_tokens, thumbnails)


def plot_inspection(inspection: VideoInspection, path: str | Path, context_length: int | None = None) -> None:
    """Plots the frames on a time line, with different colours for slow and fast frames, to a PNG, PDF or SVG file.

    With `context_length`, also shows the total as a percentage of it. Raises ImportError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; install it with: pip install 'keye_kernels[bench]'") from error
    figure = Figure(figsize=(14, 4.5), layout="constrained")
    images, bars = figure.subplots(2, 1, height_ratios=(1, 2))
    images.axis("off")
    images.set_xlim(0, 1)
    images.set_ylim(0, 1)
    width = 1 / len(inspection.thumbnails)
    for column, (index, thumbnail) in enumerate(inspection.thumbnails.items()):
        axes = images.inset_axes((column * width, 0, width * 0.96, 0.85))
        axes.imshow(thumbnail.permute(1, 2, 0).numpy())
        axes.set_title(f"{inspection.seconds[index]:.1f} s", fontsize=8)
        axes.axis("off")
    for frame_type, name, colour in ((SLOW, "slow", "tab:blue"), (FAST, "fast", "tab:orange")):
        indices = [index for index, value in enumerate(inspection.frame_types) if value == frame_type]
        if not indices:
            continue
        times = [inspection.seconds[index] for index in indices]
        tokens = [inspection.frame_tokens[index] for index in indices]
        bars.vlines(times, 0, tokens, color=colour, label=f"{name} ({len(indices)} frames)")
        bars.plot(times, tokens, "o", color=colour, markersize=4)
    title = f"Keye {inspection.edition}: {inspection.total_tokens} tokens"
    if context_length:
        title += f" of {context_length} ({inspection.total_tokens / context_length:.1%})"
    bars.set(xlabel="seconds", ylabel="tokens", title=title)
    bars.set_ylim(bottom=0)
    bars.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    figure.savefig(path, dpi=120)


def _count_text_tokens(types: list[int], seconds: torch.Tensor | None) -> int:
    # One token per marker and per character of a time: Keye's tokenizer splits numbers into digits.
    text = video_prompt(types, seconds).replace(VIDEO_PAD, "")
    for marker in (FRAME, FAST_START, FAST_END):
        text = text.replace(marker, "#")
    return len(text)


def _thumbnail(frame: torch.Tensor) -> torch.Tensor:
    size = (THUMBNAIL_HEIGHT_PIXELS, max(1, round(frame.shape[2] * THUMBNAIL_HEIGHT_PIXELS / frame.shape[1])))
    return torch.nn.functional.interpolate(frame[None], size, mode="bilinear", antialias=True)[0]
