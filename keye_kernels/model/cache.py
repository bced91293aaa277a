"""The static key/value cache. Symbols: B rows, M slots of a row, Hk key heads, D head dim."""

import torch
from torch import Tensor

from .config import KeyeConfig


class KVCache:
    """Keys and values [B, M, Hk, D] of every layer, allocated once.

    A row's tokens lie in the slots at which they stood in the input, padding included; `valid` [B, M] tells them apart.
    `length` (a 0-dim tensor, so that neither a compiled nor a recorded step depends on its value) counts the used slots, and a
    new token's position is its slot plus `rope_deltas` [B, 1]. The cache carries all that a conversation needs: two of them on
    one model do not disturb each other.
    """

    def __init__(self, config: KeyeConfig, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device):
        shape = (batch_size, max_length, config.num_key_value_heads, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.valid = torch.zeros(batch_size, max_length, dtype=torch.bool, device=device)
        self.length = torch.zeros((), dtype=torch.int64, device=device)
        self.rope_deltas = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        self.is_empty = True

    @property
    def max_length(self) -> int:
        return self.valid.shape[1]

    def check_room(self, batch_size: int, tokens: int) -> None:
        """ValueError unless `tokens` more fit in each of `batch_size` rows."""
        if self.valid.shape[0] != batch_size:
            raise ValueError(f"cache has {self.valid.shape[0]} rows, but input_ids has {batch_size}")
        # Elsewhere than on a CPU, reading the length would wait for the device
        used = int(self.length) if self.length.device.type == "cpu" and not torch.compiler.is_compiling() else 0
        if used + tokens > self.max_length:
            raise ValueError(
                f"cache holds {self.max_length} tokens a row, {used} of them used: {tokens} more do not fit; "
                "shorten the prompt or make a longer one with model.new_cache(batch_size, max_length)"
            )

    def slots(self, tokens: int) -> Tensor:
        """[tokens] indices of the next free slots."""
        return self.length + torch.arange(tokens, device=self.length.device)

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Stores [B, S, Hk, D] keys and values of one layer."""
        self.keys[layer].index_copy_(1, slots, key.detach())
        self.values[layer].index_copy_(1, slots, value.detach())

    def advance(self, slots: Tensor, attention_mask: Tensor) -> None:
        """Marks `slots` [S] as used; `attention_mask` [B, S] tells which of them hold tokens."""
        self.valid.index_copy_(1, slots, attention_mask.bool())
        self.length.add_(slots.shape[0])
        self.is_empty = False
