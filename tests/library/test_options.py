"""Options of the skip rule: what is accepted and how errors read."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from lite_attention.options import check_refresh_interval, check_rule, normalize_threshold


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (-10.0, -10.0),
        (-10, -10.0),
        (10, -10.0),
        (6.5, -6.5),
        (0, 0.0),
        (-math.inf, -math.inf),
        (np.float32(3), -3.0),
        (Fraction(1, 2), -0.5),
    ],
)
def test_threshold_is_a_negative_float(given: object, expected: float) -> None:
    threshold = normalize_threshold(given)
    assert type(threshold) is float
    assert threshold == expected


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (math.nan, ValueError, "threshold: expected a finite number or -inf, got nan"),
        (math.inf, ValueError, "threshold: expected a finite number or -inf, got inf"),
        (10**400, ValueError, "threshold: expected a finite number or -inf, got one past the range of float"),
        (True, TypeError, "threshold: expected a number, got bool True"),
        ("-10", TypeError, "threshold: expected a number, got str '-10'"),
        (None, TypeError, "threshold: expected a number, got NoneType None"),
        (1j, TypeError, "threshold: expected a number, got complex 1j"),
        (Decimal(1), TypeError, "threshold: expected a number, got Decimal"),
    ],
)
def test_bad_thresholds_are_refused_by_name(given: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        normalize_threshold(given)


def test_errors_use_the_name_given() -> None:
    with pytest.raises(ValueError, match=r"^lite_attn_threshold: "):
        normalize_threshold(math.nan, "lite_attn_threshold")


def test_rules() -> None:
    assert check_rule("mass") == "mass"
    assert check_rule("running_max") == "running_max"
    for value in ("max", None, ["mass"]):
        with pytest.raises(ValueError, match="rule: expected 'running_max', 'mass' or 'mass_summaries', got"):
            check_rule(value)


def test_refresh_interval() -> None:
    assert check_refresh_interval(0) == 0
    assert check_refresh_interval(8) == 8
    with pytest.raises(ValueError, match="refresh_interval: expected 0"):
        check_refresh_interval(-1)
    for value in (True, 1.0, "8", None):
        with pytest.raises(TypeError, match="refresh_interval: expected an int, got"):
            check_refresh_interval(value)
