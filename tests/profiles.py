"""Profiles as calibration would have found them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lite_attention.calibration import Calibration, DecodeCalibration
from lite_attention.costs import DecodeShape, Shape

DETAILS: dict[str, Any] = {
    "model": "some/model",
    "inputs": "none",
    "quantity": "error",
    "target": 0.1,
    "refresh_interval": 0,
    "reached": {},
}


def make_profile(by_layer: Mapping[str, float], **more: Any) -> DecodeCalibration:
    """A profile of a language model with these thresholds by layer."""
    details = {"stage": "decode", "shape": DecodeShape("Some", 4, 2, 16), "thresholds": dict(by_layer)}
    return DecodeCalibration(**DETAILS | details | more)


def make_denoise_profile(by_layer: Mapping[str, float], **more: Any) -> Calibration:
    """A profile of a diffusion model with these thresholds by layer."""
    details = {"rule": "running_max", "shape": Shape(384, 2, 24), "thresholds": dict(by_layer)}
    return Calibration(**DETAILS | details | more)
