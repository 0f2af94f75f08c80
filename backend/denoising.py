"""What adapters to denoising engines have in common: state by branch, steps, masks, prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Literal, TypeVar

import torch
from torch import Tensor

from lite_attention import LiteAttention
from lite_attention.options import LEARNING_STEPS
from lite_attention.ranges import Range

MAX_GAP = 4
"""Steps that a layer may miss (caching libraries skip layers) before what it learned is too old."""

TextAt = Literal["none", "start", "end"]
"""Where the tokens of the prompt stand among those of the picture or video."""

Phase = Literal["dense", "learn", "skip"]
"""What a step does: visits everything without trace; does so and decides what the next step skips; skips."""

Key = TypeVar("Key", bound=Hashable)
Layer = TypeVar("Layer", bound=LiteAttention)
Thresholds = TypeVar("Thresholds", float, Tensor)


def risen(threshold: Thresholds, rise: float, step: int, steps: int, relative: bool = False) -> Thresholds:
    """The threshold, or float32 (batch,), of a step, counted from 0, of a generation of so many.

    It rises evenly, from ``threshold`` at the first step to ``threshold + rise`` at the last one, but not above 0,
    unless it is ``relative``: then `LiteAttention` sees to that. -inf stays -inf.
    """
    last = max(steps - 1, 1)
    now = threshold + rise * (min(step, last) / last)
    if relative:
        return now
    return now.clamp(max=0.0) if isinstance(now, Tensor) else min(now, 0.0)


def phase(step: int, steps: int | None, warmup_steps: int, cooldown_steps: int) -> Phase:
    """What a step, counted from 0, of a generation of so many does; where None says how many, nothing cools down.

    The last steps of a warm-up learn if steps that skip follow, so that the first of these skips already.
    """
    end = math.inf if steps is None else steps - cooldown_steps
    if step >= end or warmup_steps >= end or step < warmup_steps - LEARNING_STEPS:
        return "dense"
    return "skip" if step >= warmup_steps else "learn"


def state_at(states: dict[Key, tuple[Layer, int]], key: Key, step: int, make: Callable[[], Layer]) -> Layer:
    """The state of a key for a step, made if need be and without what is too old; it is noted as used then."""
    attention, last = states.get(key) or (make(), step)
    if step - last > MAX_GAP:
        attention.reset_skip_state()
    states[key] = attention, step
    return attention


def text_ranges(at: TextAt, text: int, tokens: int, keys: int) -> list[Range]:
    """Which of so many tokens are the prompt's `text` tokens and always visited; only the first `keys` are keys."""
    text = min(text, tokens) if at != "none" else 0
    start = tokens - text if at == "end" else 0
    return [(start, min(start + text, keys))] if text and start < keys else []


def valid_keys(mask: Tensor) -> int | None:
    """How many keys, the first ones, a mask (..., keys) lets every query see; None if it is no such mask.

    Waits for the mask's device.
    """
    if mask.dtype != torch.bool:
        return None
    keys = mask.shape[-1]
    rows = mask.reshape(-1, keys)
    first = rows[0]
    valid = int(first.sum())
    if bool(first[:valid].all()) and bool((rows == first).all()):
        return valid
    return None
