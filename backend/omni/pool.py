"""Memory of skip states, which the requests of a pipeline use one after another.

A state that is given back keeps its memory, and the next request of its shape gets it as good as new. Places are handed
out from the first on, so requests that ask alike get the same addresses, whatever ended in between and in which order.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from lite_attention import LiteAttention, SkipState
from lite_attention.options import Rule

Shape = tuple[int, int, int, int, Rule, torch.device]
"""Slots, heads, tokens_q, tokens_k, rule and device of a state."""


@dataclass
class _Shelf:
    """The states of one shape.

    Attributes:
        states: by place.
        free: places of those that nobody has, a heap.
        used: places below this one were used since the last trim.
    """

    states: list[SkipState] = field(default_factory=list)
    free: list[int] = field(default_factory=list)
    used: int = 0


class StatePool:
    """Skip states by shape. Not for several threads at a time.

    Attributes:
        memory_bytes: of all states, in use or kept.

    Args:
        counted: is told `memory_bytes` whenever it changes.
    """

    def __init__(self, counted: Callable[[int], None] | None = None) -> None:
        self.memory_bytes = 0
        self._counted = counted
        self._shelves: dict[Shape, _Shelf] = {}
        self._taken: dict[int, tuple[Shape, int]] = {}  # by the identity of states

    @property
    def in_use(self) -> int:
        """States that were taken and not given back."""
        return len(self._taken)

    def take(self, shape: Shape) -> SkipState:
        """A state that nobody else has, as before its first step."""
        shelf = self._shelves.setdefault(shape, _Shelf())
        if shelf.free:
            place = heapq.heappop(shelf.free)
            shelf.states[place].reset()
        else:
            place = len(shelf.states)
            *sizes, rule, device = shape
            shelf.states.append(SkipState(*sizes, rule=rule, device=device))
            self._count(shelf.states[place].memory_bytes())
        shelf.used = max(shelf.used, place + 1)
        state = shelf.states[place]
        self._taken[id(state)] = shape, place
        return state

    def give(self, state: SkipState) -> None:
        """Give back a state, which must not be used any more.

        Raises:
            KeyError: it was not taken from here, or was given back before.
        """
        shape, place = self._taken.pop(id(state))
        heapq.heappush(self._shelves[shape].free, place)

    def trim(self) -> None:
        """Free the memory that was not in use at any time since the last trim."""
        for shelf in self._shelves.values():
            unused = shelf.states[shelf.used :]
            del shelf.states[shelf.used :]
            shelf.free = sorted(place for place in shelf.free if place < shelf.used)
            self._count(-sum(state.memory_bytes() for state in unused))
            shelf.used = 0
        for shape, place in self._taken.values():
            self._shelves[shape].used = max(self._shelves[shape].used, place + 1)
        self._shelves = {shape: shelf for shape, shelf in self._shelves.items() if shelf.states}

    def _count(self, more: int) -> None:
        self.memory_bytes += more
        if more and self._counted is not None:
            self._counted(self.memory_bytes)


class PooledAttention(LiteAttention):
    """`LiteAttention` whose state lies in the memory of a pool until it is released."""

    def __init__(
        self, pool: StatePool, threshold: float, *, rule: Rule = "running_max", refresh_interval: int = 0
    ) -> None:
        super().__init__(threshold, rule=rule, refresh_interval=refresh_interval)
        self._pool = pool

    def release(self) -> None:
        """Give the state back; the next step visits every block."""
        if self._state is not None:
            self._pool.give(self._state)
            self._state = None

    def _make_state(self, slots: int, heads: int, tokens_q: int, tokens_k: int, device: torch.device) -> SkipState:
        self.release()
        return self._pool.take((slots, heads, tokens_q, tokens_k, self.rule, device))
