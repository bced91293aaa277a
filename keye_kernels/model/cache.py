"""The key/value cache, and the output of `Keye.forward`.

Symbols: B sequences, S new tokens, M slots per sequence, Hk key/value heads, D head dim.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .config import KeyeConfig

if TYPE_CHECKING:
    from .conversation import Conversation

# A cache that grows has a multiple of this many slots
CACHE_BLOCK_TOKENS = 256


def slots_for(tokens: int) -> int:
    """Slots of a cache for this many tokens and at least one block of further tokens."""
    return (tokens // CACHE_BLOCK_TOKENS + 2) * CACHE_BLOCK_TOKENS


class KVCache:
    """Keys and values of every layer; create one with `Keye.new_cache`.

    The token at index i of a sequence, padding included, is in slot i. The position of a new token is its slot plus
    `rope_deltas`. The cache holds all state of a conversation, so one model can run several conversations.

    Attributes:
        keys: one [B, M, Hk, D] tensor per layer.
        values: likewise.
        valid: [B, M] bool; False for padding. Slots from `length` on do not count.
        length: 0-dim int64 tensor, the number of used slots. Not a Python int, so that compiled steps and CUDA graphs do not
            depend on its value.
        rope_deltas: [B, 1] int64.
        is_empty: True until the first tokens are added.
        grows: whether it is replaced by a larger one when it is full. CUDA graphs that use it are then invalid.
        count: `length` as the CPU knows it without waiting for a GPU. Calls in compiled code do not add to it.
        conversation: what the first slots hold, if `Keye.generate` has filled them.
    """

    def __init__(
        self, config: KeyeConfig, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device,
        storage: Tensor | None = None, grows: bool = False,
    ):  # fmt: skip
        """`storage` holds keys and values, of `cache_shape`. Default: zeros."""
        if storage is None:
            # A tensor for each layer, so that a cache that grows can free them one by one
            _, layers, *shape = cache_shape(config, batch_size, max_length)
            pairs = [torch.zeros(2, *shape, dtype=dtype, device=device).unbind() for _ in range(layers)]
            self.keys, self.values = [key for key, _ in pairs], [value for _, value in pairs]
        else:
            self.keys, self.values = (list(x.unbind()) for x in storage.unbind())
        self.valid = torch.zeros(batch_size, max_length, dtype=torch.bool, device=device)
        self.length = torch.zeros((), dtype=torch.int64, device=device)
        self.rope_deltas = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        self.is_empty, self.grows, self.count = True, grows, 0
        self.conversation: Conversation | None = None

    @property
    def max_length(self) -> int:
        """Slots per sequence."""
        return self.valid.shape[1]

    def reserve(self, batch_size: int, tokens: int, limit: int | None = None) -> None:
        """Makes room for `tokens` more tokens of each of `batch_size` sequences, and for others, up to `limit` slots in all.

        Raises ValueError if the cache is for another number of sequences, or is full and does not grow.
        """
        if len(self.valid) != batch_size:
            raise ValueError(f"cache holds {len(self.valid)} sequences, but input_ids has {batch_size}")
        used = 0
        if not torch.compiler.is_compiling():
            # On a GPU, reading the length would synchronize
            used = int(self.length) if self.length.device.type == "cpu" else self.count
        if used + tokens <= self.max_length:
            return
        if not self.grows or torch.compiler.is_compiling():
            usage = f"{self.max_length} slots per sequence, {used} of them used: {tokens} more tokens do not fit"
            raise ValueError(f"cache has {usage}; shorten the prompt or pass model.new_cache(batch_size, max_length)")
        slots = max(2 * self.max_length, slots_for(used + tokens))
        self._grow(slots if limit is None else max(min(slots, limit), used + tokens))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _grow(self, slots: int) -> None:
        old = self.max_length
        batch_size, _, *head_shape = self.keys[0].shape
        for layer in range(len(self.keys)):
            # One layer at a time, so that no more than one is in memory twice
            pair = self.keys[layer].new_zeros(2, batch_size, slots, *head_shape)
            pair[0, :, :old], pair[1, :, :old] = self.keys[layer], self.values[layer]
            self.keys[layer], self.values[layer] = pair.unbind()
        self.valid = torch.cat((self.valid, self.valid.new_zeros(len(self.valid), slots - old)), dim=1)

    def slots(self, tokens: int) -> Tensor:
        """[tokens] indices of the next free slots."""
        return self.length + torch.arange(tokens, device=self.length.device)

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Stores keys and values [B, S, Hk, D] of one layer in `slots` [S]."""
        for stored, new in ((self.keys[layer], key), (self.values[layer], value)):
            # Under autocast, projections have another dtype than the parameters
            stored.index_copy_(1, slots, new.detach().to(stored.dtype))

    def clear(self) -> None:
        """Makes the cache empty again."""
        self.valid.zero_()
        self.length.zero_()
        self.is_empty, self.count, self.conversation = True, 0, None

    def keep_first(self, tokens: int) -> None:
        """Forgets the tokens of all but the first slots."""
        if tokens == 0:
            self.clear()
            return
        self.valid[:, tokens:] = False
        self.length.fill_(tokens)
        self.count = tokens

    def truncate(self, length: Tensor) -> None:
        """Forgets the tokens from slot `length` [1] on."""
        self.valid.logical_and_(torch.arange(self.max_length, device=length.device) < length)
        self.length.copy_(length[0])

    def mark(self, slots: Tensor, attention_mask: Tensor) -> None:
        """Says which of the new tokens in `slots` [S] are valid. `attention_mask` [B, S]: 0 = padding."""
        self.valid.index_copy_(1, slots, attention_mask.bool())

    def advance(self, tokens: int) -> None:
        """Adds `tokens` to the used slots, once all layers have written them."""
        self.length.add_(tokens)
        self.is_empty = False
        if not torch.compiler.is_compiling():
            self.count += tokens


def cache_shape(config: KeyeConfig, batch_size: int, max_length: int) -> tuple[int, ...]:
    """[keys and values, layers, B, M, Hk, D]."""
    return 2, config.num_hidden_layers, batch_size, max_length, config.num_key_value_heads, config.head_dim


class KeyeOutput(NamedTuple):
    """Output of `Keye.forward`.

    Attributes:
        logits: [B, S, V], or [B, logits_to_keep, V].
        cache: keys and values of all tokens so far; pass it to the next call.
        rope_deltas: [B, 1]; the position of a token after the prompt is its cache slot plus this.
    """

    logits: Tensor
    cache: KVCache | None
    rope_deltas: Tensor
