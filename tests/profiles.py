"""Profiles as calibration would have found them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lite_attention.calibration import DecodeCalibration
from lite_attention.costs import DecodeShape


def make_profile(by_layer: Mapping[str, float], **more: Any) -> DecodeCalibration:
    """A profile with these thresholds by layer."""
    details: dict[str, Any] = {
        "stage": "decode",
        "model": "some/model",
        "inputs": "none",
        "quantity": "error",
        "target": 0.1,
        "refresh_interval": 0,
        "shape": DecodeShape("Some", 4, 2, 16),
        "thresholds": dict(by_layer),
        "reached": {},
    }
    return DecodeCalibration(**details | more)
