"""Prompt-lookup decoding: drafts of the next tokens are what followed the last tokens earlier in the text.

One forward verifies N drafts. A draft is kept if it is the token that greedy decoding chooses after the tokens before it, so the
result is that of greedy decoding. Symbols: N drafts per step, M tokens, V vocabulary size.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .cache import KVCache
from .config import check_number
from .token_state import TokenState

if TYPE_CHECKING:
    from .keye import Keye

MAX_DRAFT_TOKENS = 15  # with the last token, 16 rows: they read the weights once
MAX_MATCHED_TOKENS = 3


def check_prompt_lookup(prompt_lookup: Any, batch_size: int, do_sample: bool) -> None:
    """Raises ValueError unless `prompt_lookup` is None or may be used with these other arguments of `generate`."""
    if prompt_lookup is None:
        return
    check_number("prompt_lookup", prompt_lookup, 1, MAX_DRAFT_TOKENS)
    if do_sample or batch_size != 1:
        got = "do_sample=True" if do_sample else f"{batch_size} sequences"
        raise ValueError(f"prompt_lookup must be None except for greedy decoding of one sequence, got {got}")


def find_drafts(tokens: Tensor, length: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Drafts [count] of the tokens after the first `length` [1] of `tokens` [M], and whether there is any match.

    They follow the latest of the longest matches of the last tokens, of up to MAX_MATCHED_TOKENS. Where they reach the end of the
    text, they repeat. Reads no values, so that it can be part of a CUDA graph.
    """
    longest, total = MAX_MATCHED_TOKENS, len(tokens)
    places = torch.arange(longest, total, device=tokens.device)  # of the token after a match
    matches = places < length
    matched = torch.zeros_like(places)
    for distance in range(1, longest + 1):
        last = tokens.index_select(0, (length - distance).clamp(min=0))
        matches = matches & (tokens[longest - distance : total - distance] == last)
        matched += matches
    best, index = (matched * total + places).max(0)
    found = best >= total
    place = torch.where(found, index + longest, length - 1)
    period = length - place
    return tokens.index_select(0, place + torch.arange(count, device=tokens.device) % period), found


class LookupState(TokenState):
    """The tokens of one sequence, and its steps of up to N + 1 tokens.

    On a CPU, a step without a match is one of a single token. On a GPU all steps have N + 1, so that one graph serves all.
    """

    def __init__(self, num_drafts: int, max_length: int, *arguments: Any):
        # A last step may write N tokens too many, and on a GPU one more step may follow
        super().__init__(1, max_length + 2 * num_drafts + 1, *arguments)
        self.num_drafts, self.rows = num_drafts, num_drafts + 1
        # How many tokens are new, how many were processed for nothing, and the new tokens
        self.reported = torch.zeros(num_drafts + 3, dtype=torch.int64, device=self.tokens.device)

    def append(self, logits: Tensor) -> None:
        """Chooses the first token, after the prompt."""
        super().append(logits)
        self.reported.zero_()
        self.reported[:1] = 1
        self.reported[2:3] = self.last[0]

    def step(self, model: "Keye", cache: KVCache) -> None:
        self.cache = cache  # its `count` is corrected when the CPU knows how many drafts agreed
        drafts, found = find_drafts(self.tokens[0], self.length, self.num_drafts)
        if found.device.type == "cpu" and not found:
            drafts = drafts[:0]
        ids = torch.cat((self.last[0], drafts))[None]
        # Not `model.forward`: it compares placeholders with pixels, and drafts may be placeholders
        positions = (cache.slots(ids.shape[1]) + cache.rope_deltas).expand(3, *ids.shape)
        hidden = model.model(model.model.embed_tokens(ids), positions, torch.ones_like(ids), cache)
        self.verify(drafts, model.lm_head(hidden)[0])
        cache.truncate(self.length - 1)

    def verify(self, drafts: Tensor, logits: Tensor) -> None:
        """Appends the drafts that agree with `logits` [number of drafts + 1, V] up to the first that does not, and one token."""
        chosen = logits.argmax(-1)
        new = (chosen[:-1] == drafts).cumprod(0).sum(0, keepdim=True) + 1
        columns = self.length + torch.arange(len(chosen), device=chosen.device)
        # Columns after the new tokens are written again later
        self.tokens.index_copy_(1, columns, chosen[None])
        self.sums.index_copy_(0, columns, logits.sum(-1, dtype=torch.float32))
        self.last.copy_(chosen.index_select(0, new - 1)[None])
        self.length += new
        self.reported[:1] = new
        self.reported[1:2] = len(chosen) - new
        self.reported[2 : 2 + len(chosen)] = chosen

    def report(self) -> Tensor:
        return self.reported

    def new_tokens(self, report: Tensor) -> Iterator[Tensor]:
        new, rejected, *tokens = report.split(1)
        if rejected:
            self.cache.count -= int(rejected)
        yield from tokens[: int(new)]
