"""The pool of skip states: who has which memory, as good as new, and how much of it there is."""

from __future__ import annotations

import gc
import itertools
import weakref
from random import Random
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lite_attention import LiteAttention, SkipState
from lite_attention.backend.omni.pool import PooledAttention, Shape, StatePool
from lite_attention.options import Rule

RULES: tuple[Rule, ...] = get_args(Rule)
SHAPES: list[Shape] = [
    (*sizes, of_rule, torch.device("cpu"))
    for sizes in ((1, 1, 128, 64), (1, 1, 128, 128), (2, 2, 300, 3000))
    for of_rule in RULES
]


def fresh(shape: Shape) -> SkipState:
    *sizes, of_rule, device = shape
    return SkipState(*sizes, rule=of_rule, device=device)


def scribble(state: SkipState) -> None:
    state.mask.random_()
    if state.lse is not None:
        state.lse.normal_()


class PoolMachine(RuleBasedStateMachine):
    """A pool beside a plain account of it: which memory stands in which place, and who holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.counted = 0
        self.pool = StatePool(self.count)
        self.memory: dict[tuple[Shape, int], SkipState] = {}
        self.held: set[tuple[Shape, int]] = set()
        self.used: set[tuple[Shape, int]] = set()

    def count(self, state_bytes: int) -> None:
        self.counted = state_bytes

    @rule(shape=st.sampled_from(SHAPES))
    def take(self, shape: Shape) -> None:
        state, new = self.pool.take(shape), fresh(shape)
        assert torch.equal(state.mask, new.mask)
        assert (state.tokens_q, state.tokens_k, state.rule) == (new.tokens_q, new.tokens_k, new.rule)
        assert state.lse is None if new.lse is None else torch.equal(state.lse, new.lse)
        place = next((shape, n) for n in itertools.count() if (shape, n) not in self.held)
        assert self.memory.setdefault(place, state) is state
        self.held.add(place)
        self.used.add(place)
        scribble(state)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        place = data.draw(st.sampled_from(sorted(self.held, key=str)))
        self.held.remove(place)
        self.pool.give(self.memory[place])
        with pytest.raises(KeyError):
            self.pool.give(self.memory[place])

    @rule()
    def trim(self) -> None:
        self.pool.trim()
        last = {shape: max(place for other, place in self.used if other == shape) for shape, _ in self.used}
        self.memory = {(shape, n): state for (shape, n), state in self.memory.items() if n <= last.get(shape, -1)}
        self.used = set(self.held)

    @invariant()
    def memory_is_nobody_elses(self) -> None:
        tensors = [tensor for state in self.memory.values() for tensor in (state.mask, state.lse) if tensor is not None]
        assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
        assert self.pool.in_use == len(self.held)

    @invariant()
    def bytes_are_counted(self) -> None:
        assert self.pool.memory_bytes == self.counted == sum(state.memory_bytes() for state in self.memory.values())


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


requests = st.fixed_dictionaries(
    {
        "tokens": st.sampled_from([130, 320]),
        "rows": st.integers(1, 2),
        "threshold": st.sampled_from([-0.01, -1.0, -4.0]),
        "rule": st.sampled_from(RULES),
        "refresh_interval": st.sampled_from([0, 2]),
        "steps": st.integers(1, 3),
        "changes_shape": st.booleans(),
    }
)


@settings(max_examples=25, deadline=None)
@given(st.lists(requests, min_size=2, max_size=4))
def test_a_request_in_used_memory_is_as_one_in_new_memory(jobs: list[dict[str, Any]]) -> None:
    """Outputs, masks and shares are the same bit for bit, whatever ran before and was broken off wherever."""
    pool = StatePool()
    for seed, job in enumerate(jobs):
        options = {"rule": job["rule"], "refresh_interval": job["refresh_interval"]}
        layers = [PooledAttention(pool, job["threshold"], **options) for _ in range(2)]
        alone = [LiteAttention(job["threshold"], **options) for _ in range(2)]
        random = torch.Generator().manual_seed(seed)
        for step, (mine, its) in itertools.product(range(job["steps"]), zip(layers, alone, strict=True)):
            tokens = job["tokens"] + (64 if job["changes_shape"] and step == 1 else 0)
            query = 3 * torch.randn(job["rows"], tokens, 2, 16, generator=random)
            with torch.inference_mode(bool(step % 2)):
                assert torch.equal(mine(query, query, query), its(query, query, query))
            assert mine.skip_state is not None and its.skip_state is not None
            assert torch.equal(mine.skip_state.mask, its.skip_state.mask)
            assert mine.sparsity == its.sparsity
        assert pool.in_use == len(layers)
        for layer in layers:
            layer.release()
            layer.release()
            assert layer.skip_state is None
        pool.trim()
        assert pool.in_use == 0


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=6), st.randoms())
def test_requests_that_ask_alike_get_the_same_addresses(asked: list[Shape], random: Random) -> None:
    pool = StatePool()
    seen = set()
    for _ in range(3):
        taken = [pool.take(shape) for shape in asked]
        seen.add(tuple(state.mask.data_ptr() for state in taken))
        random.shuffle(taken)
        for state in taken:
            pool.give(state)
        pool.trim()
    assert len(seen) == 1


def test_memory_that_the_last_execution_did_not_use_is_freed() -> None:
    pool = StatePool()
    first, second = SHAPES[0], SHAPES[-1]
    states = [pool.take(first), pool.take(first), pool.take(second)]
    references = [weakref.ref(state.mask) for state in states]
    for state in states:
        pool.give(state)
    pool.trim()
    assert pool.memory_bytes == 2 * fresh(first).memory_bytes() + fresh(second).memory_bytes()
    pool.give(pool.take(first))
    pool.trim()
    del states, state
    gc.collect()
    assert pool.memory_bytes == fresh(first).memory_bytes()
    assert [reference() is None for reference in references] == [False, True, True]
    pool.trim()
    assert pool.memory_bytes == 0


def test_a_state_of_another_pool_is_refused() -> None:
    with pytest.raises(KeyError):
        StatePool().give(StatePool().take(SHAPES[0]))
