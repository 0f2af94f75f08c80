"""Thresholds that rise over the steps of a generation."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lite_attention import LiteAttention
from lite_attention.backend.denoising import phase, risen
from lite_attention.options import LEARNING_STEPS

thresholds = st.floats(-30, 0)
rises = st.floats(0, 16)
lengths = st.integers(2, 60)


@given(thresholds, rises, lengths)
def test_a_threshold_rises_from_the_first_step_to_the_last(threshold: float, rise: float, steps: int) -> None:
    schedule = [risen(threshold, rise, step, steps) for step in range(steps)]
    assert schedule[0] == threshold
    assert schedule[-1] == min(threshold + rise, 0.0)
    assert schedule == sorted(schedule)
    LiteAttention(dict(enumerate(schedule)))
    below = [now for now in schedule if now < 0]
    for before, after in pairwise(below):
        assert after - before == pytest.approx(rise / (steps - 1), abs=1e-9)


@given(thresholds, rises, lengths)
def test_a_relative_threshold_rises_past_zero(threshold: float, rise: float, steps: int) -> None:
    schedule = [risen(threshold, rise, step, steps, relative=True) for step in range(steps)]
    assert [min(now, 0.0) for now in schedule] == [risen(threshold, rise, step, steps) for step in range(steps)]
    assert schedule[-1] == threshold + rise


@given(thresholds, st.integers(0, 60), lengths)
def test_without_a_rise_it_stays_as_it_is(threshold: float, step: int, steps: int) -> None:
    assert risen(threshold, 0.0, step, steps) == threshold


@given(rises, st.integers(0, 60), lengths)
def test_what_never_skips_never_does(rise: float, step: int, steps: int) -> None:
    assert risen(-math.inf, rise, step, steps) == -math.inf


def test_a_generation_of_one_step_and_steps_past_the_end() -> None:
    assert risen(-8.0, 4.0, 0, 1) == -8.0
    assert risen(-8.0, 4.0, 9, 5) == risen(-8.0, 4.0, 4, 5) == -4.0


def test_rows_rise_each_from_its_own() -> None:
    rows = torch.tensor([-8.0, -1.0, -math.inf])
    assert torch.equal(risen(rows, 4.0, 2, 5), torch.tensor([-6.0, 0.0, -math.inf]))
    assert torch.equal(rows, torch.tensor([-8.0, -1.0, -math.inf]))


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 12))
def test_steps_learn_at_the_end_of_a_warm_up_that_something_follows(steps: int, warmup: int, cooldown: int) -> None:
    phases = [phase(step, steps, warmup, cooldown) for step in range(steps)]
    skipping = max(steps - warmup - cooldown, 0)
    learning = min(warmup, LEARNING_STEPS) if skipping else 0
    dense = warmup - learning
    assert phases == (["dense"] * dense + ["learn"] * learning + ["skip"] * skipping + ["dense"] * cooldown)[:steps]


def test_a_generation_of_unknown_length_does_not_cool_down() -> None:
    assert [phase(step, None, 3, 2) for step in (0, 1, 2, 3, 1000)] == ["dense", "learn", "learn", "skip", "skip"]
