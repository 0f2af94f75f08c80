"""The skip state of one attention layer: pooled by slot, and by physical block of the paged cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lite_attention import ops
from lite_attention.backend.vllm.device import upload
from lite_attention.costs import Meter
from lite_attention.tiles import DECODE_BLOCK, ceil_div, mask_words

_summaries: WeakValueDictionary[tuple[int, tuple[int, ...]], Tensor] = WeakValueDictionary()


class LayerState:
    """What one layer keeps over decode steps.

    Attributes:
        mask: (slots, kv_heads, words) int32, which blocks mattered at their last visit.
        summaries: see `lite_attention.reference.summarize`; None until the cache is there.
        number: of the layer among those of its engine, see `number_layers`: its row of a step's thresholds.
        meter: measures what skipping costs in steps that are checked; None for not.

    Args:
        slots: sequences at a time, and a scratch slot.
        kv_heads: of this rank.
        max_tokens: of a sequence.
    """

    def __init__(self, slots: int, kv_heads: int, max_tokens: int, device: torch.device | str = "cpu") -> None:
        words = mask_words(ceil_div(max_tokens, DECODE_BLOCK))
        self.mask = torch.zeros(slots, kv_heads, words, dtype=torch.int32, device=device)
        self.summaries: Tensor | None = None
        self.number = 0
        self.meter: Meter | None = None

    def summaries_of(self, key_cache: Tensor) -> Tensor:
        """Summaries of a cache (pages, page_size, kv_heads, head_dim), allocated when it is first seen.

        Layers whose keys lie in the same memory, each in pages of its own, share them.
        """
        shape = ops.summaries_shape(key_cache)
        if self.summaries is None or tuple(self.summaries.shape) != shape:
            known = _summaries.get((key_cache.data_ptr(), shape))
            if known is None:
                known = torch.zeros(shape, dtype=torch.uint8, device=key_cache.device)
                _summaries[key_cache.data_ptr(), shape] = known
            self.summaries = known
        return self.summaries

    def memory_bytes(self) -> int:
        """Bytes of the state by slot, summaries not counted."""
        return self.mask.nbytes


def memory_bytes(states: Sequence[LayerState]) -> int:
    """Bytes of the states of layers, and of the summaries, which some may share."""
    return sum(state.memory_bytes() for state in states) + sum(summaries.nbytes for summaries in _distinct(states))


def _distinct(states: Iterable[LayerState]) -> Iterable[Tensor]:
    """The summaries of layers, those that several share once."""
    return {id(state.summaries): state.summaries for state in states if state.summaries is not None}.values()


def skipping_layers(vllm_config: Any) -> dict[str, Any]:
    """The attention layers of an engine, by name, that have a skip state."""
    layers = vllm_config.compilation_config.static_forward_context
    return {name: layer for name, layer in layers.items() if isinstance(_state_of(layer), LayerState)}


def number_layers(vllm_config: Any) -> list[str]:
    """The names of `skipping_layers` in their order, which gives each its number; call it when all are there."""
    layers = skipping_layers(vllm_config)
    for number, layer in enumerate(layers.values()):
        layer.impl.state.number = number
    return list(layers)


def _state_of(layer: Any) -> Any:
    return getattr(getattr(layer, "impl", None), "state", None)


@torch.inference_mode()
def copy_blocks(states: Iterable[LayerState], copies: Sequence[tuple[int, int]], blocks: int) -> None:
    """The engine copied blocks (source, destination) of its cache of so many: their summaries go along."""
    pairs = torch.tensor(copies)
    for summaries in _distinct(states):
        source, destination = upload(pairs, summaries.device).unbind(1)
        by_block = summaries.view(blocks, -1)
        by_block[destination] = by_block[source]
