"""What one layer remembers between steps: which key blocks each query tile still visits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lite_attention.options import Rule, check_rule, needs_lse
from lite_attention.ranges import (
    Range,
    all_blocks,
    block_ranges,
    check_ranges,
    count_bits,
    pack_bits,
    touched_blocks,
    unpack_bits,
)
from lite_attention.tiles import BLOCK_K, TILE_Q, ceil_div


class SkipState:
    """Skip state of one layer, a slot for each sequence.

    Attributes:
        mask: int32 (slots, heads, tiles, words), 1 = visit; see `lite_attention.ranges` for the order of
            bits.
        lse: float32 (slots, heads, tokens_q), natural log-sum-exp of the step before, +inf before the first
            step; None with the rule ``running_max``.
    """

    def __init__(
        self,
        slots: int,
        heads: int,
        tokens_q: int,
        tokens_k: int,
        *,
        rule: Rule = "running_max",
        device: torch.device | str | None = None,
    ) -> None:
        """A fresh state: every tile of ``tokens_q`` queries visits every block of ``tokens_k`` keys."""
        self.tokens_q = tokens_q
        self.tokens_k = tokens_k
        self.rule = check_rule(rule)
        tiles = ceil_div(tokens_q, TILE_Q)
        self._fresh_words = all_blocks(self.blocks, device)
        self.mask = self._fresh_words.repeat(slots, heads, tiles, 1)
        self.lse: Tensor | None = None
        if needs_lse(self.rule):
            self.lse = torch.full((slots, heads, tokens_q), torch.inf, dtype=torch.float32, device=device)

    @classmethod
    def from_ranges(
        cls,
        ranges: Sequence[Sequence[Sequence[Sequence[Range]]]],
        tokens_q: int,
        tokens_k: int,
        *,
        rule: Rule = "running_max",
        device: torch.device | str | None = None,
    ) -> "SkipState":
        """The state that visits the blocks overlapping ``ranges[slot][head][tile]``; inverse of `to_ranges`.

        Raises:
            ValueError: a range reaches past ``tokens_k``, or the numbers of heads or tiles differ from those
                expected.
        """
        state = cls(len(ranges), len(ranges[0]) if ranges else 0, tokens_q, tokens_k, rule=rule, device=device)
        slots, heads, tiles, _ = state.mask.shape
        bits = torch.zeros((slots, heads, tiles, state.blocks), dtype=torch.bool, device="cpu")
        for slot, of_heads in enumerate(ranges):
            if len(of_heads) != heads:
                raise ValueError(f"ranges: expected {heads} heads in slot {slot}, got {len(of_heads)}")
            for head, of_tiles in enumerate(of_heads):
                if len(of_tiles) != tiles:
                    raise ValueError(f"ranges: expected {tiles} tiles in slot {slot}, head {head}, got {len(of_tiles)}")
                for tile, visited in enumerate(of_tiles):
                    bits[slot, head, tile] = touched_blocks(check_ranges(visited, tokens_k, "ranges"), tokens_k)
        state.mask.copy_(pack_bits(bits))
        return state

    @property
    def blocks(self) -> int:
        """Number of key blocks."""
        return ceil_div(self.tokens_k, BLOCK_K)

    @property
    def pairs(self) -> int:
        """Number of (tile, block) pairs, of all slots and heads."""
        return self.mask.shape[:3].numel() * self.blocks

    def to_ranges(self) -> list[list[list[list[Range]]]]:
        """Token ranges ``(start, end)`` visited by each ``[slot][head][tile]``, in natural order."""
        bits = unpack_bits(self.mask, self.blocks).tolist()
        return [[[block_ranges(of_tile, self.tokens_k) for of_tile in of_head] for of_head in slot] for slot in bits]

    def sparsity(self, slot: int | None = None) -> float:
        """Share of (tile, block) pairs that are not visited, 0 to 1: of one slot, or of all."""
        mask = self.mask if slot is None else self.mask[slot]
        pairs = mask[..., 0].numel() * self.blocks if self.blocks else 0
        return 1.0 - int(count_bits(mask).sum()) / pairs if pairs else 0.0

    def memory_bytes(self) -> int:
        """Bytes of the mask and, where the rule needs it, of the log-sum-exp."""
        return self.mask.nbytes + (self.lse.nbytes if self.lse is not None else 0)

    def reset(self, slots: int | Sequence[int] | Tensor | None = None) -> None:
        """Return ``slots``, or all, to what they were before the first step."""
        rows = slice(None) if slots is None else slots
        self.mask[rows] = self._fresh_words
        if self.lse is not None:
            self.lse[rows] = torch.inf

    def refresh(self, heads: Sequence[int] | None = None) -> None:
        """Let the next pass visit every block, of some heads or of all, and keep the log-sum-exp."""
        self.mask[:, slice(None) if heads is None else heads] = self._fresh_words
