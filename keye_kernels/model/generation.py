"""Generation: sampling, end tokens, streaming and the decoding loop behind `Keye.generate`.

Symbols: B sequences, S prompt tokens per sequence, V vocabulary size.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from keye_kernels.host_copy import HostCopies

from .cache import KVCache, slots_for
from .config import check_number, read_json
from .conversation import resume
from .prompt_lookup import LookupState
from .step_graph import recorded_step
from .token_state import TokenState, reports

if TYPE_CHECKING:
    from .keye import Keye

SAMPLING_LIMITS = (("temperature", 1e-9, 1e9), ("top_k", 0, 2**31), ("top_p", 1e-9, 1.0))
SEED_LIMITS = (-(2**63), 2**64 - 1)  # of torch.Generator


class Streamer(Protocol):
    """The interface of transformers' streamers: `put` gets the prompt [B, S], then the tokens [B] of each step."""

    def put(self, value: Tensor) -> object: ...
    def end(self) -> object: ...


class TextStreamer:
    """Streams the generated text of one sequence, without its prompt. Emits whole characters only.

    Args:
        decode: turns a list of token ids into text.
        write: receives each new part of the text.
    """

    def __init__(self, decode: Callable[[list[int]], str], write: Callable[[str], object]):
        self.decode, self.write = decode, write
        self.ids: list[int] = []
        self.chars_written = 0
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Receives the prompt [1, S], which starts a new text, then one token [1] per call."""
        if not self.prompt_seen or value.ndim > 1:
            # Also after a generation that an exception ended without a call of `end`
            self.ids, self.chars_written, self.prompt_seen = [], 0, True
            return
        if value.numel() != 1:
            raise ValueError(f"streamer must be used with a batch of one sequence, got {value.numel()} sequences")
        self.ids.append(int(value))
        text = self.decode(self.ids)
        # A character of several tokens decodes to U+FFFD until its last token has arrived
        if not text.endswith("\ufffd"):
            self._write_new(text)

    def end(self) -> None:
        """Emits the rest of the text. The next prompt starts a new one."""
        self._write_new(self.decode(self.ids))
        self.ids, self.chars_written, self.prompt_seen = [], 0, False

    def _write_new(self, text: str) -> None:
        if len(text) > self.chars_written:
            self.write(text[self.chars_written :])
            self.chars_written = len(text)


@dataclass
class Sampler:
    """Chooses the next token of each sequence: greedy, or by sampling after temperature, top-k and top-p, in this order.

    `device` is that of the logits. The other arguments are those of `Keye.generate`.
    """

    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        if isinstance(self.temperature, (int, float)) and self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}; use do_sample=False for greedy decoding")
        for name, low, high in SAMPLING_LIMITS:
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), low, high)
        if self.seed is not None:
            check_number("seed", self.seed, *SEED_LIMITS)
        self.generator = None if self.seed is None else torch.Generator(self.device).manual_seed(self.seed)

    @classmethod
    def from_arguments(
        cls, do_sample: bool, given: dict[str, Any], defaults: dict[str, Any], device: torch.device | str
    ) -> "Sampler":
        """The sampler for arguments of `generate`; None is replaced by the value in `defaults`. Warns if they are ignored."""
        sampling = {name: first_given(given[name], defaults.get(name)) for name, _, _ in SAMPLING_LIMITS}
        sampler = cls(do_sample, **sampling, seed=given["seed"], device=device)
        ignored = [name for name, value in given.items() if value is not None]
        if ignored and not do_sample:
            warnings.warn(f"{', '.join(ignored)} ignored: decoding is greedy without do_sample=True", stacklevel=4)
        return sampler

    def __call__(self, logits: Tensor) -> Tensor:
        """[B, V] logits to [B] token ids."""
        if not self.do_sample:
            return logits.argmax(-1)
        logits = logits.float() / (self.temperature or 1.0)
        if self.top_k and self.top_k < logits.shape[-1]:
            threshold = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < threshold, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = logits.sort(descending=True)
            probability = ordered.softmax(-1)
            # The sum excludes the token itself, so that the most likely token is always kept
            removed = probability.cumsum(-1) - probability >= self.top_p
            logits = logits.masked_fill(removed.scatter(1, order, removed), -torch.inf)
        # As torch.multinomial, which waits for the GPU and stops the process at NaN: with q from the exponential distribution,
        # p / q is largest at a token with probability p
        probabilities = logits.softmax(-1)
        return (probabilities / torch.empty_like(probabilities).exponential_(generator=self.generator)).argmax(-1)


def end_token_ids(eos_token_id: int | Iterable[int] | None, vocab_size: int) -> list[int]:
    """End tokens as a list; empty means that generation does not stop before max_new_tokens."""
    if eos_token_id is None:
        return []
    try:
        if isinstance(eos_token_id, (bool, Mapping)):
            raise TypeError
        ends = [index(token) for token in ([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)]
    except TypeError as error:
        raise ValueError(f"eos_token_id must be an integer or a list of integers, got {eos_token_id!r:.100}") from error
    for token in ends:
        # A token that is not in the vocabulary would never end an answer
        check_number("eos_token_id", token, 0, vocab_size - 1)
    return ends


def check_streamer(streamer: Any) -> None:
    if streamer is not None and not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
        raise TypeError(f"streamer must have methods put and end, got {type(streamer).__name__}")


def first_given(*values: Any) -> Any:
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)


def read_generation_config(file: Path, vocab_size: int) -> dict[str, Any]:
    """The content of generation_config.json, {} if there is none. Raises ValueError naming the file and the field."""
    values = read_json(file)
    sampling: dict[str, Any] = {name: values.get(name) for name, _, _ in SAMPLING_LIMITS}
    try:
        Sampler(**sampling)
        end_token_ids(values.get("eos_token_id"), vocab_size)
        check_number("pad_token_id", first_given(values.get("pad_token_id"), 0), 0, vocab_size - 1)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return values


def generate_tokens(
    model: "Keye",
    inputs: dict[str, Any],
    max_new_tokens: int,
    sampler: Sampler,
    end_tokens: list[int],
    pad_token_id: int,
    streamer: Streamer | None,
    prompt_lookup: int | None = None,
    cache: KVCache | None = None,
) -> Tensor:
    """Prefills a prompt, then decodes one token per sequence and step; returns [B, S + number of new tokens].

    `inputs` are arguments of `model.forward`, with input_ids [B, S]. What `cache` holds of them is not processed again. In the
    end it holds all tokens but the last one. A sequence ends with any of `end_tokens` and is then filled with `pad_token_id`.
    Raises RuntimeError at the end if logits were not finite.

    The CPU does not wait for the tokens of a GPU before it launches the next step. One step may therefore run after the last end
    token; its tokens are dropped.
    """
    input_ids, device = inputs["input_ids"], model.device
    batch_size, length = input_ids.shape
    arguments = length + max_new_tokens, sampler, end_tokens, pad_token_id, device
    state = LookupState(prompt_lookup, *arguments) if prompt_lookup else TokenState(batch_size, *arguments)
    conversation, limit = None, state.max_length
    if cache is None:
        # It grows to the size of all tokens, because few answers have `max_new_tokens`
        cache = KVCache(model.config, batch_size, min(slots_for(length), limit), model.dtype, device, grows=True)
    else:
        if not cache.grows and cache.max_length < limit:
            needed = f"{length} prompt tokens and {max_new_tokens} new tokens"
            raise ValueError(
                f"cache has {cache.max_length} slots per sequence, too few for {needed}; use model.new_cache(batch_size)"
            )
        conversation, inputs = resume(model, cache, inputs)
        limit = model.config.max_position_embeddings
    state.start(input_ids)
    if streamer is not None:
        streamer.put(input_ids)
    state.append(model(**inputs, cache=cache, logits_to_keep=1).logits)
    cache.conversation = conversation
    generator = sampler.generator if sampler.do_sample else None
    run = recorded_step(model, cache, lambda: state.step(model, cache), max_new_tokens - 1, generator)

    def step() -> None:
        cache.reserve(batch_size, state.rows, limit)
        run()

    new = 0  # also if the streamer raises
    try:
        all_reports = reports(step, max_new_tokens, state.report, HostCopies(device))
        new = _follow(all_reports, state, end_tokens, max_new_tokens, streamer)
    finally:
        if conversation is not None:
            conversation.extend(state.tokens[:, length : length + new - 1])
            cache.keep_first(conversation.ids.shape[1])
    if not state.sums[length : length + new].sum().isfinite():
        cache.clear()
        torch._foreach_zero_([*cache.keys, *cache.values])  # a masked slot that is not finite would spread
        raise RuntimeError(f"the logits are NaN or infinite; check the weights, or try another dtype than {model.dtype}")
    return state.tokens[:, : length + new].clone()


def _follow(
    step_reports: Iterator[Tensor], state: TokenState, end_tokens: list[int], max_new_tokens: int, streamer: Streamer | None
) -> int:
    """Streams the tokens of `step_reports`, which run the steps, until all sequences have ended. Returns the new columns."""
    ends = torch.tensor(end_tokens, dtype=torch.int64, device="cpu")
    finished = torch.zeros(len(state.tokens), dtype=torch.bool, device="cpu")
    new_tokens = (chosen for report in step_reports for chosen in state.new_tokens(report))
    for count, chosen in enumerate(new_tokens, 1):
        if streamer is not None:
            streamer.put(chosen)
        finished |= torch.isin(chosen, ends)
        if count == max_new_tokens or finished.all():
            break
    if streamer is not None:
        streamer.end()
    return count
