"""CUDA graphs of the decoder for short prompts, which a GPU runs faster than a CPU can launch them.

A graph fills a cache of its own. The keys and values of the prompt are then copied into the cache of the call.
Symbols: B sequences, S tokens per sequence.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from keye_kernels.ops.implementation import default_impl

from .cache import KVCache, cache_shape
from .graphs import Entry, GraphCache, GraphMemory, ModuleState

if TYPE_CHECKING:
    from .decoder import Decoder

TOKEN_BUCKETS = (32, 64, 96, 128, 192, 256, 384, 512)  # per sequence; the last one is also the limit for all sequences


class Bucket(NamedTuple):
    """What the prompts of one graph have in common: their number, the most tokens of one, and what the caller chooses."""

    batch_size: int
    num_tokens: int
    default_impl: str  # of `use_impl` and KEYE_KERNELS_IMPL

    @classmethod
    def of(cls, batch_size: int, length: int) -> "Bucket | None":
        """The smallest bucket for this many prompts of this many tokens; None if there is none."""
        tokens = next((size for size in TOKEN_BUCKETS if length <= size and batch_size * size <= TOKEN_BUCKETS[-1]), None)
        return None if tokens is None else cls(batch_size, tokens, default_impl())


class PromptGraphs(GraphCache):
    """The graphs of the decoder of one model."""

    doing = "prompts run"

    def __init__(self) -> None:
        super().__init__()
        self._storage: Tensor | None = None  # of the keys and values of all buckets: one graph runs at a time

    def _clear(self) -> None:
        super()._clear()
        self._storage = None

    def memory(self) -> GraphMemory:
        captured, num_bytes = super().memory()
        return GraphMemory(captured, num_bytes + (0 if self._storage is None or not captured else self._storage.nbytes))

    def prefill(
        self, decoder: "Decoder", embeds: Tensor, position_ids: Tensor, attention_mask: Tensor, cache: KVCache
    ) -> Tensor | None:
        """The forward of `decoder` with an empty `cache`. None if it has to run without a graph."""
        (batch_size, length), device = embeds.shape[:2], embeds.device
        bucket = Bucket.of(batch_size, length)
        if bucket is None or embeds.dtype != cache.keys[0].dtype or not self.may_run(device):
            return None

        def take(entry: _PromptEntry, hidden: Tensor) -> Tensor:
            for to, of in ((cache.keys, entry.cache.keys), (cache.values, entry.cache.values)):
                # One launch for many layers
                torch._foreach_copy_([x[:, :length] for x in to], [x[:, :length] for x in of])
            cache.mark(cache.slots(length), attention_mask)
            cache.advance(length)
            return hidden[:, :length].clone()

        return self.run(
            (decoder,),
            device,
            bucket,
            make=lambda state: _PromptEntry(decoder, state, bucket, self._shared_storage(decoder, embeds), embeds),
            set_inputs=lambda entry: entry.set_inputs(embeds, position_ids, attention_mask),
            take=take,
        )

    def _shared_storage(self, decoder: "Decoder", like: Tensor) -> Tensor:
        if self._storage is None:
            self._storage = like.new_zeros(cache_shape(decoder.config, 1, TOKEN_BUCKETS[-1]))
        return self._storage


class _PromptEntry(Entry):
    def __init__(self, decoder: "Decoder", state: ModuleState, bucket: Bucket, storage: Tensor, embeds: Tensor):
        super().__init__((decoder,), state, embeds.device)
        shape = bucket.batch_size, bucket.num_tokens
        self.embeds = embeds.new_zeros(*shape, embeds.shape[-1])
        self.position_ids = torch.zeros(3, *shape, dtype=torch.int64, device=embeds.device)
        self.mask = torch.zeros(shape, dtype=torch.bool, device=embeds.device)
        total = bucket.batch_size * bucket.num_tokens
        self.cache = KVCache(decoder.config, *shape, embeds.dtype, embeds.device, storage[:, :, 0, :total].unflatten(2, shape))
        self.bytes = self.embeds.nbytes + self.position_ids.nbytes

    def set_inputs(self, embeds: Tensor, position_ids: Tensor, attention_mask: Tensor) -> None:
        length = embeds.shape[1]
        self.embeds[:, :length].copy_(embeds)
        self.position_ids[:, :, :length].copy_(position_ids)
        self.mask[:, length:] = False  # padding on the right: a segment of its own
        self.mask[:, :length].copy_(attention_mask != 0)

    def forward(self) -> Tensor:
        self.cache.clear()
        (decoder,) = self.modules
        return decoder(self.embeds, self.position_ids, self.mask, self.cache)
