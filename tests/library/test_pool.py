"""States that are lent again are as new, stay where they were, and are freed when nobody asks for them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lite_attention import LiteAttention, SkipState
from lite_attention.pool import StatePool

KEYS = ((1, 2, 200, 300), (2, 2, 200, 300), (1, 2, 500, 64))


def make(key: tuple[int, ...]) -> SkipState:
    return SkipState(*key, rule="mass")


@settings(deadline=None)
@given(executions=st.lists(st.lists(st.sampled_from(KEYS), max_size=6), max_size=6))
def test_lent_states_are_new_and_those_not_asked_for_are_freed(executions: list[list[tuple[int, ...]]]) -> None:
    changes = []
    pool = StatePool(lambda: changes.append(pool.memory_bytes()))
    before: dict[Any, list[int]] = {}
    for keys in executions:
        states = [pool.take(key, lambda key=key: make(key)) for key in keys]
        assert len({id(state) for state in states}) == len(states)
        for key, state in zip(keys, states, strict=True):
            fresh = make(key)
            assert torch.equal(state.mask, fresh.mask) and torch.equal(state.lse, fresh.lse)
            state.mask.zero_()
            state.lse.zero_()
        addresses = {key: [s.mask.data_ptr() for k, s in zip(keys, states, strict=True) if k == key] for key in keys}
        for key, known in before.items():
            both = min(len(known), len(addresses.get(key, [])))
            assert addresses.get(key, [])[:both] == known[:both]
        pool.end()
        assert pool.memory_bytes() == sum(make(key).memory_bytes() for key in keys)
        assert not changes or changes[-1] == pool.memory_bytes()
        before = addresses


def test_attention_with_a_pool_equals_attention_without() -> None:
    pool = StatePool()
    torch.manual_seed(0)
    tensors = torch.randn(3, 4, 1, 300, 2, 32).unbind(0)
    tensors[0][..., 0] = 10.0
    tensors[1][..., 0] = torch.linspace(-10, 10, 300)[:, None]  # early keys matter little
    outs = []
    for pooled in (pool, pool, None):
        attention = LiteAttention(-1.0)
        attention.pool = pooled
        outs.append([attention(*step) for step in zip(*tensors, strict=True)])
        pool.end()
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*outs, strict=True))
    assert attention.sparsity > 0
