"""Choosing tokens: greedy or by sampling, for batches, with several end tokens and a streamer."""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor


class Streamer(Protocol):
    """Receives the prompt [B, S] first, then the new tokens [B] of each step, then the end; as in transformers."""

    def put(self, value: Tensor) -> None: ...
    def end(self) -> None: ...


class TextStreamer:
    """Writes the text of one row as it grows, whole characters only.

    `decode` turns a list of ids into text, `write` takes each new part. The prompt is left out.
    """

    def __init__(self, decode: Callable[[list[int]], str], write: Callable[[str], object]):
        self.decode, self.write = decode, write
        self.ids: list[int] = []
        self.written = 0
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        if value.numel() != 1:
            raise ValueError(f"streamer must be used with a batch of one row, got {value.numel()}")
        self.ids.append(int(value))
        text = self.decode(self.ids)
        # A character of several tokens shows as U+FFFD until its last byte is there
        if not text.endswith("\ufffd"):
            self._write(text)

    def end(self) -> None:
        self._write(self.decode(self.ids))

    def _write(self, text: str) -> None:
        if len(text) > self.written:
            self.write(text[self.written :])
            self.written = len(text)


class Sampler:
    """Picks the next token of each row from its logits [B, V]: greedy, or after temperature, top-k and top-p, in this order."""

    def __init__(
        self,
        do_sample: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        device: torch.device | str = "cpu",
    ):
        if temperature is not None and temperature <= 0:
            raise ValueError(
                f"temperature must be above 0, got {temperature}; use do_sample=False for the likeliest token"
            )
        if top_k is not None and top_k < 0:
            raise ValueError(f"top_k must be at least 1, or 0 for no limit, got {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
        self.do_sample, self.temperature, self.top_k, self.top_p = do_sample, temperature, top_k, top_p
        self.generator = None if seed is None else torch.Generator(device).manual_seed(seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """[B] token ids."""
        if not self.do_sample:
            return logits.argmax(-1)
        logits = logits.float() / (self.temperature or 1.0)
        if self.top_k and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = logits.sort(descending=True)
            share = ordered.softmax(-1)
            # What stands before a token decides, so that the likeliest always stays
            out = share.cumsum(-1) - share >= self.top_p
            logits = logits.masked_fill(out.scatter(1, order, out), -torch.inf)
        return logits.softmax(-1).multinomial(1, generator=self.generator)[:, 0]


def end_tokens(eos_token_id: int | Iterable[int] | None, default: int | Iterable[int] | None) -> list[int]:
    """The ids at which a row stops; an empty collection means never."""
    chosen = default if eos_token_id is None else eos_token_id
    if chosen is None:
        return []
    return [chosen] if isinstance(chosen, int) else [int(token) for token in chosen]
