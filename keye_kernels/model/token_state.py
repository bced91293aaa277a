"""The tokens of a generation on the device of the model: choosing, storing and ending, without a wait of the CPU.

Symbols: B sequences, M tokens of the longest one, V vocabulary size.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from keye_kernels.host_copy import HostCopies

from .cache import KVCache

if TYPE_CHECKING:
    from .generation import Sampler
    from .keye import Keye


class TokenState:
    """Prompts and generated tokens of B sequences. A CUDA graph of a step updates these tensors in place.

    Attributes:
        tokens: [B, M] int64.
        length: [1] int64, the number of columns of `tokens` that are in use.
        last: [B, 1] int64, the tokens in the last of them, which the next step processes.
        finished: [B] bool, whether a sequence has had an end token. Then `pad_token_id` follows.
        sums: [M] float32, the sum of all logits of each column: not finite if any of them is not. Read once, at the end.
        rows: the most tokens of a sequence that a step processes.
    """

    rows = 1

    def __init__(
        self, batch_size: int, max_length: int, sampler: "Sampler", end_tokens: list[int], pad_token_id: int, device: torch.device
    ):
        self.sampler, self.pad_token_id = sampler, pad_token_id
        self.end_tokens = torch.tensor(end_tokens, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(batch_size, max_length, dtype=torch.int64, device=device)
        self.last = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        self.length = torch.zeros(1, dtype=torch.int64, device=device)
        self.finished = torch.zeros(batch_size, dtype=torch.bool, device=device)
        self.sums = torch.zeros(max_length, device=device)

    @property
    def max_length(self) -> int:
        """Columns of `tokens`."""
        return self.tokens.shape[1]

    def start(self, prompt: Tensor) -> None:
        """Stores prompts [B, S] in place of all tokens."""
        self.tokens[:, : prompt.shape[1]] = prompt
        self.length.fill_(prompt.shape[1])
        self.finished.zero_()
        self.sums.zero_()

    def append(self, logits: Tensor) -> None:
        """Chooses a token of each sequence by its logits [B, 1, V]."""
        self.sums.index_copy_(0, self.length, logits.sum(dtype=torch.float32)[None])
        chosen = self.sampler(logits[:, -1]).masked_fill(self.finished, self.pad_token_id)
        self.last.copy_(chosen[:, None])
        self.tokens.index_copy_(1, self.length, self.last)
        if len(self.end_tokens):
            self.finished |= (self.last == self.end_tokens).any(1)
        self.length += 1

    def step(self, model: "Keye", cache: KVCache) -> None:
        """Runs the last tokens and chooses the next ones."""
        self.append(model(self.last, cache=cache).logits)

    def report(self) -> Tensor:
        """What the CPU needs to know of a step: the tokens [B]."""
        return self.last[:, 0]

    def new_tokens(self, report: Tensor) -> Iterator[Tensor]:
        """The tokens [B] of each new column in a report on the CPU."""
        yield report


def reports(step: Callable[[], object], steps: int, report: Callable[[], Tensor], copies: HostCopies) -> Iterator[Tensor]:
    """Runs `step` after the first and before each later one of `steps` reports, and yields copies of the reports on the CPU.

    Those of a GPU are one step late, so that the GPU has a step to run while the CPU handles them.
    """
    pending: deque[Callable[[], Tensor]] = deque()
    for index in range(steps):
        if index:
            step()
        pending.append(copies.start(report()))
        if len(pending) > copies.delay:
            yield pending.popleft()()
    for finish in pending:
        yield finish()
