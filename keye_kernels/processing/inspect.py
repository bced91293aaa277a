"""What the model sees of a video: sampled times, slow and fast frames, tokens by frame; as numbers and as a drawing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .images import Edition
from .patches import PatchConfig, to_frame_tensors
from .processor import KeyeProcessor
from .slow_fast import FAST, SLOW
from .videos import fetch_video

THUMBNAIL_HEIGHT = 90
MAX_THUMBNAILS = 12


@dataclass(frozen=True)
class VideoInspection:
    """A video as the model gets it. N sampled frames.

    Attributes:
        edition: "preview" or "1.5".
        seconds: N times; the frame's number where pictures came without ``fps``.
        frame_types: N numbers, 0 slow and 1 fast; Preview's frames are all slow.
        frame_sizes: N pairs ``(height, width)`` in pixels.
        frame_tokens: N numbers of vision tokens.
        text_tokens: tokens of frame markers and times that 1.5 writes between the frames; Keye's tokenizer splits
            numbers into digits, so they are counted by character.
        thumbnails: up to 12 of the frames, uint8 ``[3, 90, w]``, by frame number.
    """

    edition: Edition
    seconds: list[float]
    frame_types: list[int]
    frame_sizes: list[tuple[int, int]]
    frame_tokens: list[int]
    text_tokens: int
    thumbnails: dict[int, torch.Tensor]

    @property
    def total_tokens(self) -> int:
        """Tokens that the video takes of the context, vision and text."""
        return sum(self.frame_tokens) + self.text_tokens

    def to_text(self, context_length: int | None = None) -> str:
        """A table of the frames and the total, also as a share of ``context_length``."""
        lines = ["frame  seconds  type  height x width  tokens"]
        rows = zip(self.seconds, self.frame_types, self.frame_sizes, self.frame_tokens, strict=True)
        for index, (seconds, kind, (height, width), tokens) in enumerate(rows):
            name = "fast" if kind == FAST else "slow"
            lines.append(f"{index:5d}  {seconds:7.2f}  {name}  {height:6d} x {width:<5d}  {tokens:6d}")
        slow = self.frame_types.count(SLOW)
        total = f"{self.total_tokens} tokens"
        if context_length:
            total += f", {self.total_tokens / context_length:.1%} of the context of {context_length}"
        lines.append(f"{len(self.seconds)} frames ({slow} slow, {len(self.seconds) - slow} fast): {total}")
        return "\n".join(lines)


def inspect_video(
    video: Any, processor: KeyeProcessor | Edition = "preview", options: Mapping[str, Any] | None = None
) -> VideoInspection:
    """Samples a video and counts what it costs.

    Args:
        video: as ``video`` of a message part, see :func:`~keye_kernels.processing.videos.fetch_video`.
        processor: the checkpoint's processor, or an edition, with that edition's usual limits.
        options: options of the part, such as ``fps``.

    Raises:
        ValueError, TypeError, FileNotFoundError: as for ``fetch_video``.
    """
    edition = processor.edition if isinstance(processor, KeyeProcessor) else processor
    sampled = fetch_video({**(options or {}), "video": video}, edition=edition)
    frames = to_frame_tensors(sampled.frames, edition)
    config = processor.patch_config if isinstance(processor, KeyeProcessor) else PatchConfig.from_dict({}, edition)
    if edition == "preview":
        types = [SLOW] * len(frames)
        sizes = [config.resized_size(*frames[0].shape[1:])] * len(frames)
        text_tokens = 0
    else:
        types = sampled.frame_types.tolist()
        sizes = [(sampled.slow_size, sampled.fast_size)[kind] for kind in types]
        text_tokens = _count_text_tokens(types, sampled.seconds)
    seconds = [float(index) for index in range(len(frames))]
    if sampled.seconds is not None:
        # Preview repeats the last frame of an odd list.
        seconds = (sampled.seconds.tolist() + sampled.seconds[-1:].tolist())[: len(frames)]
    shown = torch.linspace(0, len(frames) - 1, min(len(frames), MAX_THUMBNAILS)).round().long().unique().tolist()
    return VideoInspection(
        edition,
        seconds,
        types,
        sizes,
        [height * width // config.factor**2 for height, width in sizes],
        text_tokens,
        {index: _thumbnail(frames[index]) for index in shown},
    )


def plot_inspection(inspection: VideoInspection, path: str | Path, context_length: int | None = None) -> None:
    """Draws the frames on a time line, slow and fast ones marked, into an image file.

    Args:
        inspection: from :func:`inspect_video`.
        path: PNG, PDF or SVG file to write.
        context_length: the model's, to name the share of it.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; install it with: pip install 'keye_kernels[bench]'") from error
    figure = Figure(figsize=(14, 4.5), layout="constrained")
    pictures, bars = figure.subplots(2, 1, height_ratios=(1, 2))
    pictures.axis("off")
    pictures.set_xlim(0, 1)
    pictures.set_ylim(0, 1)
    for place, (index, thumbnail) in enumerate(inspection.thumbnails.items()):
        left, width = place / len(inspection.thumbnails), 1 / len(inspection.thumbnails)
        axes = pictures.inset_axes((left, 0, width * 0.96, 0.85))
        axes.imshow(thumbnail.permute(1, 2, 0).numpy())
        axes.set_title(f"{inspection.seconds[index]:.1f} s", fontsize=8)
        axes.axis("off")
    for kind, name, colour in ((SLOW, "slow", "tab:blue"), (FAST, "fast", "tab:orange")):
        chosen = [index for index, of_frame in enumerate(inspection.frame_types) if of_frame == kind]
        if not chosen:
            continue
        times = [inspection.seconds[index] for index in chosen]
        tokens = [inspection.frame_tokens[index] for index in chosen]
        bars.vlines(times, 0, tokens, color=colour, label=f"{name} ({len(chosen)} frames)")
        bars.plot(times, tokens, "o", color=colour, markersize=4)
    title = f"Keye {inspection.edition}: {inspection.total_tokens} tokens"
    if context_length:
        title += f" of {context_length} ({inspection.total_tokens / context_length:.1%})"
    bars.set(xlabel="seconds", ylabel="tokens", title=title)
    bars.set_ylim(bottom=0)
    bars.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    figure.savefig(path, dpi=120)


def _count_text_tokens(types: list[int], seconds: torch.Tensor | None) -> int:
    markers = sum(3 if kind == FAST else 1 for kind in types)
    return markers + (0 if seconds is None else sum(len(format(time, ".1f")) for time in seconds.tolist()))


def _thumbnail(frame: torch.Tensor) -> torch.Tensor:
    size = (THUMBNAIL_HEIGHT, max(1, round(frame.shape[2] * THUMBNAIL_HEIGHT / frame.shape[1])))
    return torch.nn.functional.interpolate(frame[None], size, mode="bilinear", antialias=True)[0]
