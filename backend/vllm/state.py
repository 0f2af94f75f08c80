"""The skip state of one attention layer: pooled by slot, and by physical block of the paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from lite_attention import ops
from lite_attention.tiles import DECODE_BLOCK, ceil_div, mask_words

_layers: list[LayerState] = []


class LayerState:
    """What one layer keeps over decode steps.

    Attributes:
        mask: (slots, kv_heads, words) int32, which blocks mattered at their last visit.
        lse: (slots, heads) float32, each head's log-sum-exp of the step before.
        summaries: see `lite_attention.reference.summarize`; None until the cache is there.

    Args:
        slots: sequences at a time, and a scratch slot.
        heads, kv_heads: of this rank.
        max_tokens: of a sequence.
    """

    def __init__(
        self, slots: int, heads: int, kv_heads: int, max_tokens: int, device: torch.device | str = "cpu"
    ) -> None:
        words = mask_words(ceil_div(max_tokens, DECODE_BLOCK))
        self.mask = torch.zeros(slots, kv_heads, words, dtype=torch.int32, device=device)
        self.lse = torch.zeros(slots, heads, dtype=torch.float32, device=device)
        self.summaries: Tensor | None = None
        _layers.append(self)

    def summaries_of(self, key_cache: Tensor) -> Tensor:
        """Summaries of a cache (pages, page_size, kv_heads, head_dim), allocated when it is first seen."""
        shape = ops.summaries_shape(key_cache)
        if self.summaries is None or tuple(self.summaries.shape) != shape:
            self.summaries = torch.zeros(shape, dtype=torch.uint8, device=key_cache.device)
        return self.summaries

    def memory_bytes(self) -> int:
        """Bytes of the state by slot and of the summaries."""
        summaries = 0 if self.summaries is None else self.summaries.nbytes
        return self.mask.nbytes + self.lse.nbytes + summaries


def memory_bytes() -> int:
    """Bytes of the state of all layers of this process."""
    return sum(layer.memory_bytes() for layer in _layers)


def copy_page(source: int, destination: int) -> None:
    """The engine copied a page of the cache: the summaries go along, in every layer."""
    for layer in _layers:
        if layer.summaries is not None:
            layer.summaries[destination] = layer.summaries[source]
