"""Options of the skip rule: what a caller may give, checked and normalized in one place."""

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Literal, cast, get_args

Rule = Literal["running_max", "mass", "mass_summaries"]
"""When a key block is cleared, and what stands in for it: `lite_attention.reference.forward` defines the rules."""


*_others, _last = map(repr, get_args(Rule))
RULES_SHOWN = f"{', '.join(_others)} or {_last}"
"""As an error shows what it expects."""

MAX_THRESHOLD_RISE = 16.0
"""By how much, log2 of a weight, a threshold may rise over the steps: more than lies between any two in use."""


RELATIVE_THRESHOLD = -1.0
"""Where to begin with thresholds that are relative to 1 / blocks."""


LEARNING_STEPS = 2
"""Steps that visit everything before one can skip: the rules learn what a row weighs, then what a block does."""


def needs_lse(rule: Rule) -> bool:
    """Whether the rule compares with the log-sum-exp of the step before, which the state then keeps."""
    return rule != "running_max"


def normalize_threshold(value: object, name: str = "threshold") -> float:
    """Return ``value`` as a threshold: log2 of a weight, at most 0, or -inf for no skipping.

    A positive number means its negative: 10 is -10.

    Raises:
        TypeError: ``value`` is not a number (a bool is none).
        ValueError: ``value`` is NaN or +inf.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}")
    try:
        threshold = float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a finite number or -inf, got one past the range of float") from None
    if math.isnan(threshold) or threshold == math.inf:
        raise ValueError(f"{name}: expected a finite number or -inf, got {threshold}")
    return -abs(threshold)


def check_schedule(value: Mapping[int, float], name: str = "threshold") -> dict[int, float]:
    """Return thresholds by the step from which on each holds, as `normalize_threshold` gives them, in order of steps.

    Raises:
        TypeError: a step is not an int, a threshold not a number.
        ValueError: there is none, a step is negative, or a threshold is NaN or +inf.
    """
    if not value:
        raise ValueError(f"{name}: expected a threshold for at least one step, got none")
    for step in value:
        if isinstance(step, bool) or not isinstance(step, int):
            raise TypeError(f"{name}: expected ints as steps, got {type(step).__name__} {step!r}")
        if step < 0:
            raise ValueError(f"{name}: expected steps from 0 on, got {step}")
    return {step: normalize_threshold(value[step], f"{name}[{step}]") for step in sorted(value)}


def check_threshold_rise(value: object, name: str = "threshold_rise") -> float:
    """Return ``value`` if a threshold may rise by as much over the steps of a generation.

    Raises:
        TypeError: ``value`` is not a number (a bool is none).
        ValueError: ``value`` is NaN, negative or above `MAX_THRESHOLD_RISE`.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}")
    if not 0 <= value <= MAX_THRESHOLD_RISE:
        raise ValueError(f"{name}: expected a number from 0 to {MAX_THRESHOLD_RISE:.0f}, got {value}")
    return float(value)


def check_heads(value: Iterable[int], name: str = "dense_heads") -> tuple[int, ...]:
    """Return numbers of heads in order, each once.

    Raises:
        TypeError: one is not an int.
        ValueError: one is negative.
    """
    heads = tuple(value)
    for head in heads:
        if isinstance(head, bool) or not isinstance(head, int):
            raise TypeError(f"{name}: expected ints, got {type(head).__name__} {head!r}")
        if head < 0:
            raise ValueError(f"{name}: expected heads from 0 on, got {head}")
    return tuple(sorted(set(heads)))


def check_rule(value: object, name: str = "rule") -> Rule:
    """Return ``value`` if it names a rule.

    Raises:
        ValueError: it does not.
    """
    if value not in get_args(Rule):
        raise ValueError(f"{name}: expected {RULES_SHOWN}, got {value!r}")
    return cast(Rule, value)


def check_relative(value: object, rule: Rule, name: str = "relative") -> bool:
    """Return ``value`` if thresholds of the rule may be relative to 1 / blocks, or are not to be.

    Raises:
        TypeError: ``value`` is not a bool.
        ValueError: it is True and the rule does not compare shares of a softmax.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__} {value!r}")
    if value and not needs_lse(rule):
        raise ValueError(
            f"{name}: expected False with the rule {rule!r}, which compares no shares of a softmax, got True"
        )
    return value


def check_refresh_interval(value: object, name: str = "refresh_interval") -> int:
    """Return ``value`` if it is a number of steps, 0 for never.

    Raises:
        TypeError: ``value`` is not an int.
        ValueError: ``value`` is negative.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
    if value < 0:
        raise ValueError(f"{name}: expected 0 (never) or more steps, got {value}")
    return value
