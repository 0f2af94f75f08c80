"""Skip states that outlive the executions that use them."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Hashable

from lite_attention.state import SkipState


class StatePool:
    """Lends skip states, and lends them again in the next execution.

    An execution that asks for the same states in the same order as the one before gets each at the address where it
    was, as fresh as a new one. States that an execution did not ask for are freed when it ends.
    """

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        """An empty pool.

        Args:
            changed: called when `memory_bytes` has changed.
        """
        self._changed = changed
        self._free: defaultdict[Hashable, deque[SkipState]] = defaultdict(deque)
        self._lent: list[tuple[Hashable, SkipState]] = []

    def take(self, key: Hashable, make: Callable[[], SkipState]) -> SkipState:
        """A fresh state, until `end`.

        Args:
            key: equal for states that can stand for each other.
            make: makes a fresh one.
        """
        free = self._free[key]
        if free:
            state = free.popleft()
            state.reset()
            self._lent.append((key, state))
        else:
            state = make()
            self._lent.append((key, state))
            self._changed()
        return state

    def end(self) -> None:
        """Nobody uses what was lent any more."""
        freed = any(self._free.values())
        self._free.clear()
        for key, state in self._lent:
            self._free[key].append(state)
        self._lent.clear()
        if freed:
            self._changed()

    def memory_bytes(self) -> int:
        """Bytes of all states, lent or not."""
        free = (state for states in self._free.values() for state in states)
        return sum(state.memory_bytes() for state in (*free, *(state for _, state in self._lent)))
