"""Collects the frames of a Keye-VL-1.5 video while their types, and so their final sizes, are not yet known."""

from __future__ import annotations

import torch

from .sampling import Options, Size, slow_fast_sizes
from .video_reader import DecodedFrame

# Limit of the frames that are kept at their original size until their final size is known. Above it, the file is decoded twice.
MAX_PENDING_BYTES = 256 * 1024**2


class FrameBuffer:
    """Collects frames in classification order, each resized as soon as its final size is known.

    The sizes shrink with each slow frame. They are known once they are the same for "all remaining frames are slow" and "all
    remaining frames are fast". Until then, frames are kept as decoded, up to `MAX_PENDING_BYTES`; above this limit `frames` stays
    incomplete.
    """

    def __init__(self, options: Options, height: int, width: int, count: int, original_size: bool) -> None:
        self.frames: list[torch.Tensor] = []
        self._options, self._size, self._count, self._original_size = options, (height, width), count, original_size
        self._pending: list[DecodedFrame] = []
        self._pending_bytes = 0

    def sizes(self, fast_frames: int) -> tuple[Size, Size]:
        return slow_fast_sizes(self._options, *self._size, self._count - fast_frames, fast_frames)

    def add(self, frame: DecodedFrame, pixels: torch.Tensor, types: list[int]) -> None:
        """Adds the next frame, given as decoded and as RGB; `types` are the types of all frames up to this one."""
        if self._original_size:
            self.frames.append(pixels)
        elif self._pending_bytes <= MAX_PENDING_BYTES:
            sizes = self.sizes(sum(types))
            if sizes == self.sizes(sum(types) + self._count - len(types)):
                kept = zip(self._pending, types, strict=False)
                self.frames += [shrink(pending.to_rgb(), sizes[frame_type]) for pending, frame_type in kept]
                self.frames.append(shrink(pixels, sizes[types[-1]]))
                self._pending = []
                return
            self._pending.append(frame)
            self._pending_bytes += frame.nbytes
            if self._pending_bytes > MAX_PENDING_BYTES:
                self._pending = []


def shrink(pixels: torch.Tensor, size: Size) -> torch.Tensor:
    """Resizes a frame to its final size if that is smaller; the processor does the enlarging."""
    if size[0] * size[1] >= pixels.shape[1] * pixels.shape[2]:
        return pixels
    return torch.nn.functional.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]
